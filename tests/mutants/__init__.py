"""How the tests are tested: small, realistic mistakes, put into the code one at a time.

`python -m tests.mutants` says which of them the suite notices. mistakes.py and second.py have the
lists; a test of the suite keeps them applicable.

First round: 303 of 306 were noticed by the tests of their file. Of the other three, run.py:2 is
noticed by test_ras_sampling, which is now in its list, pipeline.py:6 by a test that is new, and one
was no mistake on a CPU and has been replaced (nextdit.py:8).

Second round, made up after the tests had been strengthened for the first: 50 of 64 were noticed at
once, 51 by the whole suite. There are tests for the other 13 now.
"""
