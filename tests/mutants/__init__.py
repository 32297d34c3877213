"""How the tests are tested: small, realistic mistakes, put into the code one at a time.

`python -m tests.mutants` says which of them the suite notices. mistakes.py has the list; a test of
the suite keeps it applicable. Result: 268 of the first 271 of 306 were noticed by the
tests of their file. Not noticed: nextdit.py:8, which torch's softmax makes the same on a CPU;
run.py:2, which keeps keys a step too early and is noticed by test_ras_sampling; pipeline.py:6.
"""
