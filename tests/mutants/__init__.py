"""How the tests are tested: small, realistic mistakes, put into the code one at a time.

`python -m tests.mutants` says which of them the suite notices. mistakes.py has the list; a test of
the suite keeps it applicable. Results so far: of a fair sample of 28 of the first 286 all were
noticed. Of 20 written afterwards, 19 at once; the other one (a later dense step leaves the cache as
it was) since a test was added. The whole list has not been run yet.
"""
