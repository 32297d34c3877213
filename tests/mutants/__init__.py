"""How the tests are tested: small, realistic mistakes, put into the code one at a time.

`python -m tests.mutants` says which of them the suite notices. Every round has a list, mistakes.py,
second.py, third.py, fourth.py and fifth.py; a test of the suite keeps them applicable.

First round: 303 of 306 were noticed by the tests of their file. Of the other three, run.py:2 is
noticed by test_ras_sampling, which is now in its list, pipeline.py:6 since
test_a_result_that_is_not_finite_is_no_picture has a case whose infinite values stay few, and one
was no mistake on a CPU and has been replaced (nextdit.py:8).

Second round, made up after the tests had been strengthened for the first: 50 of 64 were noticed at
once, 51 by the whole suite. There are tests for the other 13 now.

Third round, made up from the code alone after those: 43 of 48 were noticed at once, 90 %. There are
tests for the other 5 now (ras/trace.py:0, ras/record.py:0, ras/given.py:1, scheduler.py:0 and
pipeline.py:0), which says nothing of mistakes that nobody has made up yet.

Fourth round, again from the code alone: of the 99 that came to mind 44 were in an earlier round
already, and 3 were none on a CPU. Of the 52 that were new, 39 were noticed at once, 75 %, and 40 by
the whole suite: what is left to be made up is what tests find hardest. nextdit.py:1 turned out to
be none on a CPU either, where attention to nothing is zero; there are tests for the other 11 now.

Fifth round, made up from the code after the tests had been strengthened once more, by whoever had
done so: 63 of 74 were noticed at once by the tests of their file, 85 %. There are tests for the
other 11 now (plan.py:1 and 2, cache.py:0 and 1, record.py:4, upstream.py:2, flow.py:1 and 4,
pipeline.py:3, parts.py:0 and tokenizers.py:1). Most of these were a second argument, a second layer
or an ending where a test had only ever one: that is where to look next.

Mistakes of the lists come to somebody's mind, and what is left to be made up is what tests find
hardest. So drawn.py draws them by lot from the syntax tree: 6,600 small changes of ras/, minidit/
and weights/ (`--drawn N --seed S`). What was noticed at once, by the tests of its file, before
there were tests for what the lot had shown; "none" is what changes nothing that a CPU can see, such
as an initial value that is never read, or an argument that is at its default:

    lot                          mistakes   none   noticed
    seed 1, ras/ and minidit/         298     15       265   94 %
    seed 2, ras/ and minidit/         399      6       379   96 %
    seed 3, ras/ and minidit/         291      9       277   98 %
            weights/                  109      3        90   85 %
    seed 4, ras/ and minidit/         174      3       167   98 %
            weights/ (228 of 300)      54      5        42   86 %

A seed draws from the code as it is: these lots were of that day's. There are tests for the rest of
seeds 1 to 3 now, but for the messages of argparse.
"""
