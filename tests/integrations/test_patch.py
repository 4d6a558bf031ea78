"""`Integration` on a package written for the tests: what is replaced, when a patch is refused, what is restored."""

import importlib
import logging
import subprocess
import sys
import threading
import warnings

import pytest

from fastrlhf.integrations import PatchError, _targets, _versions
from fastrlhf.integrations._patch import Integration
from fastrlhf.integrations._targets import NotReplaced, Target, Unsupported

PACKAGE = "fastrlhf_fake_package"
FILES = {
    "__init__.py": "__version__ = '1.2.3'\n",
    "home.py": (
        "def double(x, times=2):\n    return x * times\n\n"
        "def other(x):\n    return -x\n\n"
        "class Head:\n"
        "    def forward(self, x):\n        return ('package', x)\n"
        "    @staticmethod\n    def apply(x):\n        return ('static', x)\n\n"
        "class Child(Head):\n    pass\n\n"
        "REGISTRY = {'double': double, 'other': other}\n"
    ),
    "eager.py": "from fastrlhf_fake_package.home import double, double as renamed\n",
    "lazy.py": "from fastrlhf_fake_package.home import double\n",
}


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The package's home module, freshly imported; eager.py is loaded, lazy.py is not."""
    package = tmp_path / PACKAGE
    package.mkdir()
    for name, text in FILES.items():
        (package / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(_versions.TESTED, PACKAGE, _versions.TestedRange("1.1", "1.2"))
    importlib.import_module(f"{PACKAGE}.eager")
    yield importlib.import_module(f"{PACKAGE}.home")
    for name in [n for n in sys.modules if n.partition(".")[0] == PACKAGE]:
        del sys.modules[name]


def make_double(original, backend="auto"):
    def double(x, times=2):
        if x is None:
            raise Unsupported("x is None")
        return ("ours", x, times)

    return double


def make_forward(original, backend="auto"):
    def forward(self, x):
        return ("ours", type(self).__name__, x)

    return forward


def make_apply(original, backend="auto"):
    return lambda x: ("ours", original(x))


DOUBLE = Target(f"{PACKAGE}.home", "double", "token_logprob", make_double, ("x", "times"))
FORWARD = Target(f"{PACKAGE}.home", "Head.forward", "ppo_loss", make_forward)
APPLY = Target(f"{PACKAGE}.home", "Child.apply", "linear_logprob", make_apply)


def integration(*targets, **options):
    return Integration(PACKAGE, targets or (DOUBLE,), **options)


def places():
    """Everything that unpatch() must restore, compared by identity."""
    home, eager = sys.modules[f"{PACKAGE}.home"], sys.modules[f"{PACKAGE}.eager"]
    return [
        home.double,
        home.REGISTRY["double"],
        eager.double,
        eager.renamed,
        vars(home.Head)["forward"],
        vars(home.Child).get("apply"),
        dict(home.REGISTRY),
    ]


def same(before, after):
    return all(
        a is b or (isinstance(a, dict) and a == b) for a, b in zip(before, after, strict=True)
    )


def test_every_reference_is_replaced_and_restored(home):
    fake, before = integration(DOUBLE, FORWARD, APPLY), places()
    eager = sys.modules[f"{PACKAGE}.eager"]
    with fake.patch() as patched:
        assert fake.patched
        for function in (home.double, eager.double, eager.renamed, home.REGISTRY["double"]):
            assert function(3, times=5) == ("ours", 3, 5)
        assert home.Head().forward(1) == ("ours", "Head", 1)
        assert home.Child().forward(1) == ("ours", "Child", 1)
        assert home.Child.apply(1) == ("ours", ("static", 1))
        assert home.Head.apply(1) == ("static", 1)  # the parent's method is unchanged
        assert home.other is home.REGISTRY["other"]
        assert patched.calls[DOUBLE.name] == 4
        assert home.double.__name__ == "double"
    assert not fake.patched
    assert same(before, places())
    assert "apply" not in vars(home.Child)
    assert home.double(3) == 6


def test_a_module_imported_while_patched_is_restored(home):
    fake, original = integration(), home.double
    with fake.patch():
        lazy = importlib.import_module(f"{PACKAGE}.lazy")
        assert lazy.double(1) == ("ours", 1, 2)
    assert lazy.double is original


def test_a_replacement_held_by_user_code_calls_the_original_after_unpatch(home):
    fake = integration()
    with fake.patch():
        kept = home.double
    assert kept(4) == 8
    assert fake.calls() == {}


def test_functions_are_restored_when_the_last_handle_is_released(home):
    fake, original = integration(), home.double
    first = fake.patch()
    replacement = home.double
    with fake.patch():
        assert home.double is replacement  # a second patch() does not wrap the replacement
    assert home.double is replacement
    second = fake.patch()
    first.unpatch()
    first.unpatch()  # releasing a handle twice counts once
    assert home.double is replacement
    second.unpatch()
    assert home.double is original


def test_suspended_runs_the_originals(home):
    fake = integration()
    with fake.patch() as patched:
        with patched.suspended():
            assert home.double(3) == 6
            assert fake.patched
        assert home.double(3) == ("ours", 3, 2)
    assert patched.calls == {DOUBLE.name: 1}
    with fake.suspended():
        assert home.double(3) == 6
    assert not fake.patched


def test_suspensions_of_two_threads_overlap(home):
    """The originals run until the last of two overlapping blocks ends."""
    fake = integration()
    with fake.patch() as patched:
        first, second = patched.suspended(), patched.suspended()
        first.__enter__(), second.__enter__()
        first.__exit__(None, None, None)
        assert home.double(3) == 6
        second.__exit__(None, None, None)
        assert home.double(3) == ("ours", 3, 2)
    ours = fake.patch() and home.double
    with fake.suspended():
        fake.unpatch()
    assert ours(3) == 6  # a held replacement stays inactive


def test_a_released_handle_cannot_be_entered(home):
    fake = integration()
    handle = fake.patch()
    with handle:
        pass
    with (
        pytest.raises(
            RuntimeError, match="handle of fastrlhf_fake_package is already released.*call patch"
        ),
        handle,
    ):
        pass


def test_unpatch_releases_all_handles(home):
    fake, original = integration(), home.double
    with fake.patch() as handle:
        fake.patch()
        fake.unpatch()
        fake.unpatch()
        assert home.double is original
        with fake.patch():
            handle.unpatch()  # released already; the new patch stays
            assert home.double is not original
    assert home.double is original


def test_patching_again_with_other_options_is_an_error(home):
    fake = integration()
    with fake.patch(backend="reference"):
        with pytest.raises(RuntimeError, match="unpatch"):
            fake.patch(backend="auto")
        fake.patch(backend="reference")
        fake.unpatch()
    with fake.patch(backend="auto"):
        assert fake.patched


def test_exceptions_leave_the_block_unpatched(home):
    fake, before = integration(), places()
    with pytest.raises(ZeroDivisionError), fake.patch():
        raise ZeroDivisionError
    assert same(before, places())


def test_unsupported_calls_run_the_original(home, caplog):
    fake, original = integration(), home.double
    with caplog.at_level(logging.WARNING, "fastrlhf"), fake.patch() as patched:
        for _ in range(3):
            with pytest.raises(TypeError) as raised:
                home.double(None)  # the original's error, unchanged
    with pytest.raises(TypeError) as expected:
        original(None)
    assert str(raised.value) == str(expected.value)
    assert raised.value.__context__ is None
    assert patched.fallbacks == {(DOUBLE.name, "x is None"): 3}
    assert patched.calls == {}
    assert [r.getMessage() for r in caplog.records] == [
        f"{DOUBLE.name} falls back to the original function: x is None"
    ]


def test_report_names_op_backend_and_what_is_unchanged(home, caplog):
    def refuse(original, backend="auto"):
        raise NotReplaced("it needs no op")

    other = Target(f"{PACKAGE}.home", "other", "gae", refuse)
    fake = integration(DOUBLE, other, unchanged={f"{PACKAGE}.third": "no op computes it"})
    with caplog.at_level(logging.INFO, "fastrlhf"), fake.patch(backend="reference") as patched:
        assert home.other(1) == -1
    assert patched.report == [
        f"{PACKAGE}.home.double runs token_logprob, backend reference; "
        "3 imported references replaced",
        f"{PACKAGE}.third is left unchanged: no op computes it",
        f"{PACKAGE}.home.other is left unchanged: it needs no op",
    ]
    assert [r.getMessage() for r in caplog.records] == [
        f"{PACKAGE} 1.2.3: {x}" for x in patched.report
    ]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (DOUBLE._replace(attribute="gone"), f"has no {PACKAGE}.home.gone"),
        (DOUBLE._replace(module=f"{PACKAGE}.gone"), f"cannot import {PACKAGE}.gone"),
        (DOUBLE._replace(attribute="Gone.forward"), f"has no {PACKAGE}.home.Gone"),
        (FORWARD._replace(attribute="Head.gone"), f"has no {PACKAGE}.home.Head.gone"),
        (DOUBLE._replace(attribute="REGISTRY[gone]"), r"has no .*REGISTRY\[gone\]"),
        (DOUBLE._replace(attribute="REGISTRY[other]", new=True), r"has .*\[other\] already"),
        (DOUBLE._replace(parameters=("x", "factor")), "takes .*'x', 'times'.* expected .*'factor'"),
    ],
)
def test_a_missing_target_is_named_and_nothing_is_patched(home, target, message):
    fake, before = integration(FORWARD, target), places()
    with pytest.raises(PatchError, match=message):
        fake.patch()
    assert same(before, places())
    assert not fake.patched
    assert fake._handles == set()


def test_an_error_midway_restores(home, monkeypatch):
    fake, before = integration(DOUBLE, FORWARD), places()
    set_value = _targets.Site.set

    def fail_on_forward(site, value):
        if site.key == "forward" and value is not before[4]:
            set_value(site, value)
            raise OSError("midway")
        set_value(site, value)

    monkeypatch.setattr(_targets.Site, "set", fail_on_forward)
    with pytest.raises(OSError, match="midway"):
        fake.patch()
    assert same(before, places())
    assert not fake.patched


def test_registry_entries_are_added_and_removed(home):
    entry = Target(f"{PACKAGE}.home", "REGISTRY[mine]", "ppo_loss", make_double, new=True)
    with integration(entry).patch():
        assert home.REGISTRY["mine"](1) == ("ours", 1, 2)
        with pytest.raises(ValueError, match="x is None"):
            home.REGISTRY["mine"](None)  # a new entry has no original
    assert list(home.REGISTRY) == ["double", "other"]


def test_one_entry_of_a_registry(home):
    original = home.double
    entry = DOUBLE._replace(attribute="REGISTRY[double]")
    with integration(entry).patch():
        assert home.REGISTRY["double"](1) == home.double(1) == ("ours", 1, 2)
    assert home.REGISTRY["double"] is home.double is original


def test_a_later_patch_by_other_code_is_kept(home):
    fake = integration()
    fake.patch()
    ours = home.double
    home.double = lambda x: ("theirs", ours(x))
    with pytest.warns(UserWarning, match="home.double was replaced by other code"):
        fake.unpatch()
    assert home.double(2) == ("theirs", 4)


@pytest.mark.parametrize(("version", "warns"), [("1.0.9", 1), ("1.1", 0), ("1.2.9", 0), ("1.3", 1)])
def test_versions_outside_the_tested_range_warn(home, monkeypatch, version, warns):
    monkeypatch.setattr(sys.modules[PACKAGE], "__version__", version)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with integration().patch():
            assert home.double(1) == ("ours", 1, 2)
    assert len(caught) == warns
    if warns:
        assert f"{version} is outside the tested range" in str(caught[0].message)
        assert "1.1 to 1.2" in str(caught[0].message)


def test_a_package_that_is_not_installed_is_an_import_error():
    with pytest.raises(ImportError, match="no_such_package is not installed"):
        Integration("no_such_package", ()).patch()


def test_threads_share_one_patch(home):
    fake, original, seen = integration(), home.double, []
    barrier = threading.Barrier(8)

    def work():
        barrier.wait()
        for _ in range(50):
            with fake.patch():
                seen.append(home.double(1))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [("ours", 1, 2)] * 400
    assert home.double is original
    assert fake.calls() == {DOUBLE.name: 400}


def test_status_reads_versions_without_importing_packages(monkeypatch):
    versions = {"trl": "1.16.4", "verl": "0.8.0"}
    monkeypatch.setattr(_versions, "installed", versions.get)
    table = _versions.status()
    assert table["trl"] == {"version": "1.16.4", "tested": "1.16", "in_tested_range": True}
    assert table["verl"]["in_tested_range"] is False
    assert table["openrlhf"]["version"] is None
    assert table["openrlhf"]["in_tested_range"] is False


def test_importing_an_integration_does_not_import_its_package():
    code = (
        "import sys, fastrlhf.integrations.trl, fastrlhf.integrations.transformers;"
        "print(sorted({'trl', 'transformers', 'verl', 'openrlhf', 'accelerate'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("package", ["transformers", "trl"])
@pytest.mark.parametrize("backend", ["nonsense", None, 3])
def test_a_wrong_backend_is_refused_before_anything_is_patched(package, backend):
    pytest.importorskip(package)
    module = importlib.import_module(f"fastrlhf.integrations.{package}")
    with pytest.raises(
        ValueError, match=f"{package}.patch: backend must be one of .*; got {backend!r}"
    ):
        module.patch(backend=backend)
    assert not module._INTEGRATION.patched
