"""Which families of models the trainer serves: the verdict on a tiny model of each, against the recorded one.

docs/families.json has a verdict for each family and minor version of transformers; `python tests/zoo.py` writes
it. On a version without a record the test prints its verdicts. A wrong result without a refusal fails on any version.
"""

import pytest
import transformers

from _support import zoo
from fastrlhf.train import models

RECORDED = zoo.recorded()
NIGHTLY = pytest.mark.nightly


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in zoo.SOME else NIGHTLY) for n in zoo.FAMILIES],
)
def test_verdict(name):
    verdict = zoo.judge(name)
    known = RECORDED.get(zoo.version())
    if known is None:
        print(f"transformers {transformers.__version__}: {name}: {verdict}")
    else:
        assert verdict == known[name], "if this is right, record it: python tests/zoo.py"


def test_the_record_has_every_family_and_each_that_must_work_does():
    for verdicts in RECORDED.values():
        assert verdicts.keys() == zoo.FAMILIES.keys()
    newest = RECORDED[max(RECORDED, key=lambda v: [int(x) for x in v.split(".")])]
    broken = {n: v for n, v in newest.items() if not v.startswith("works")}
    assert not [n for n in broken if zoo.FAMILIES[n].must_work], broken


def test_the_page_has_the_recorded_table():
    assert zoo.table(RECORDED) in zoo.PAGE.read_text()


def test_a_wrong_result_is_no_verdict(monkeypatch):
    """An unembedding that drops Granite's factor would be silent without the comparison, and without the self-check."""
    path = zoo.folder("granite")
    monkeypatch.setattr("fastrlhf.train.heads._scale", lambda lm: 1.0)
    policy = models.load_policy(path, zoo.runtime(), trainable=True)
    with pytest.raises(AssertionError, match="log-probs are wrong by up to"):
        zoo.check_training_path(policy, path)
    assert "fails the self-check" not in zoo.judge("granite") and "refused" in zoo.judge("granite")
