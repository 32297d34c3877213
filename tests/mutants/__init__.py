"""How the tests are tested: small, realistic mistakes, put into the code one at a time.

`python -m tests.mutants` says which of them the suite notices. mistakes.py has the list; a test of
the suite keeps it applicable.
"""
