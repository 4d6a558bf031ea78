"""The patching machinery, on a host package written for the purpose: what it replaces, and that it lets go."""

import importlib
import logging
import subprocess
import sys
import threading
import warnings

import pytest

from fastrlhf.integrations import _hosts, _patch
from fastrlhf.integrations._patch import Host, HostMoved, LeftAlone, Target, Unserved

HOST = "fastrlhf_fake_host"
FILES = {
    "__init__.py": "__version__ = '1.2.3'\n",
    "home.py": (
        "def double(x, times=2):\n    return x * times\n\n"
        "def other(x):\n    return -x\n\n"
        "class Head:\n"
        "    def forward(self, x):\n        return ('host', x)\n"
        "    @staticmethod\n    def apply(x):\n        return ('static', x)\n\n"
        "class Child(Head):\n    pass\n\n"
        "REGISTRY = {'double': double, 'other': other}\n"
    ),
    "eager.py": "from fastrlhf_fake_host.home import double, double as renamed\n",
    "lazy.py": "from fastrlhf_fake_host.home import double\n",
}


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The fake host's home module, freshly imported; eager.py is loaded, lazy.py is not."""
    package = tmp_path / HOST
    package.mkdir()
    for name, text in FILES.items():
        (package / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(_hosts.TESTED, HOST, _hosts.Tested("1.1", "1.2"))
    importlib.import_module(f"{HOST}.eager")
    yield importlib.import_module(f"{HOST}.home")
    for name in [n for n in sys.modules if n.partition(".")[0] == HOST]:
        del sys.modules[name]


def make_double(original, backend="auto"):
    def double(x, times=2):
        if x is None:
            raise Unserved("x is None")
        return ("ours", x, times)

    return double


def make_forward(original, backend="auto"):
    def forward(self, x):
        return ("ours", type(self).__name__, x)

    return forward


def make_apply(original, backend="auto"):
    return lambda x: ("ours", original(x))


DOUBLE = Target(f"{HOST}.home", "double", "token_logprob", make_double, ("x", "times"))
FORWARD = Target(f"{HOST}.home", "Head.forward", "ppo_loss", make_forward)
APPLY = Target(f"{HOST}.home", "Child.apply", "linear_logprob", make_apply)


def host(*targets, **options):
    return Host(HOST, targets or (DOUBLE,), **options)


def places():
    """Everything that a complete undo must put back, by identity."""
    home, eager = sys.modules[f"{HOST}.home"], sys.modules[f"{HOST}.eager"]
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


def test_every_place_is_patched_and_put_back(home):
    fake, before = host(DOUBLE, FORWARD, APPLY), places()
    eager = sys.modules[f"{HOST}.eager"]
    with fake.patch() as patched:
        assert fake.patched
        for function in (home.double, eager.double, eager.renamed, home.REGISTRY["double"]):
            assert function(3, times=5) == ("ours", 3, 5)
        assert home.Head().forward(1) == ("ours", "Head", 1)
        assert home.Child().forward(1) == ("ours", "Child", 1)
        assert home.Child.apply(1) == ("ours", ("static", 1))
        assert home.Head.apply(1) == ("static", 1)  # the parent's own is not touched
        assert home.other is home.REGISTRY["other"]
        assert patched.calls[DOUBLE.name] == 4
        assert home.double.__name__ == "double"
    assert not fake.patched
    assert same(before, places())
    assert "apply" not in vars(home.Child)
    assert home.double(3) == 6


def test_a_module_imported_while_patched_is_put_back_too(home):
    fake, original = host(), home.double
    with fake.patch():
        lazy = importlib.import_module(f"{HOST}.lazy")
        assert lazy.double(1) == ("ours", 1, 2)
    assert lazy.double is original


def test_a_copy_kept_outside_the_host_calls_the_original_afterwards(home):
    fake = host()
    with fake.patch():
        kept = home.double
    assert kept(4) == 8
    assert fake.calls() == {}


def test_holders_are_counted_and_the_last_one_lets_go(home):
    fake, original = host(), home.double
    first = fake.patch()
    replacement = home.double
    with fake.patch():
        assert home.double is replacement  # applying twice wraps nothing twice
    assert home.double is replacement
    second = fake.patch()
    first.unpatch()
    first.unpatch()  # a holder counts once
    assert home.double is replacement
    second.unpatch()
    assert home.double is original


def test_suspended_runs_the_hosts_own(home):
    fake = host()
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
    """The second to begin ends last, and found the first one's state."""
    fake = host()
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
    assert ours(3) == 6  # a copy does not come back to life


def test_a_handle_that_let_go_is_not_entered_again(home):
    fake = host()
    handle = fake.patch()
    with handle:
        pass
    with pytest.raises(RuntimeError, match="has let go of fastrlhf_fake_host.*call patch"), handle:
        pass


def test_unpatch_lets_go_for_all(home):
    fake, original = host(), home.double
    with fake.patch() as holder:
        fake.patch()
        fake.unpatch()
        fake.unpatch()
        assert home.double is original
        with fake.patch():
            holder.unpatch()  # of an application that is over
            assert home.double is not original
    assert home.double is original


def test_other_options_are_an_error(home):
    fake = host()
    with fake.patch(backend="reference"):
        with pytest.raises(RuntimeError, match="unpatch"):
            fake.patch(backend="auto")
        fake.patch(backend="reference")
        fake.unpatch()
    with fake.patch(backend="auto"):
        assert fake.patched


def test_exceptions_leave_the_block_unpatched(home):
    fake, before = host(), places()
    with pytest.raises(ZeroDivisionError), fake.patch():
        raise ZeroDivisionError
    assert same(before, places())


def test_calls_that_cannot_be_served_run_the_hosts_own(home, caplog):
    fake, original = host(), home.double
    with caplog.at_level(logging.WARNING, "fastrlhf"), fake.patch() as patched:
        for _ in range(3):
            with pytest.raises(TypeError) as theirs:
                home.double(None)  # the host's own error, untouched
    with pytest.raises(TypeError) as expected:
        original(None)
    assert str(theirs.value) == str(expected.value)
    assert theirs.value.__context__ is None
    assert patched.fallbacks == {(DOUBLE.name, "x is None"): 3}
    assert patched.calls == {}
    assert [r.getMessage() for r in caplog.records] == [
        f"{DOUBLE.name} runs the host's own function: x is None"
    ]


def test_report_names_op_backend_and_what_is_left_alone(home, caplog):
    def refuse(original, backend="auto"):
        raise LeftAlone("it is fine as it is")

    other = Target(f"{HOST}.home", "other", "gae", refuse)
    fake = host(DOUBLE, other, left_alone={f"{HOST}.third": "no op does it"})
    with caplog.at_level(logging.INFO, "fastrlhf"), fake.patch(backend="reference") as patched:
        assert home.other(1) == -1
    assert patched.report == [
        f"{HOST}.home.double runs token_logprob, backend reference; "
        "also in 3 places that hold it by value",
        f"{HOST}.third is left alone: no op does it",
        f"{HOST}.home.other is left alone: it is fine as it is",
    ]
    assert [r.getMessage() for r in caplog.records] == [
        f"{HOST} 1.2.3: {x}" for x in patched.report
    ]


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (DOUBLE._replace(attribute="gone"), f"has no {HOST}.home.gone"),
        (DOUBLE._replace(module=f"{HOST}.gone"), f"cannot import {HOST}.gone"),
        (DOUBLE._replace(attribute="Gone.forward"), f"has no {HOST}.home.Gone"),
        (FORWARD._replace(attribute="Head.gone"), f"has no {HOST}.home.Head.gone"),
        (DOUBLE._replace(attribute="REGISTRY[gone]"), r"has no .*REGISTRY\[gone\]"),
        (DOUBLE._replace(attribute="REGISTRY[other]", new=True), r"has .*\[other\] already"),
        (DOUBLE._replace(parameters=("x", "factor")), "takes .*'x', 'times'.* expects .*'factor'"),
    ],
)
def test_what_has_moved_is_named_and_nothing_is_patched(home, target, said):
    fake, before = host(FORWARD, target), places()
    with pytest.raises(HostMoved, match=said):
        fake.patch()
    assert same(before, places())
    assert not fake.patched
    assert fake._holders == set()


def test_an_error_half_way_restores(home, monkeypatch):
    fake, before = host(DOUBLE, FORWARD), places()
    put = _patch._Site.set

    def fail_on_forward(site, value):
        if site.key == "forward" and value is not before[4]:
            put(site, value)
            raise OSError("half-way")
        put(site, value)

    monkeypatch.setattr(_patch._Site, "set", fail_on_forward)
    with pytest.raises(OSError, match="half-way"):
        fake.patch()
    assert same(before, places())
    assert not fake.patched


def test_registry_entries_are_added_and_taken_away(home):
    entry = Target(f"{HOST}.home", "REGISTRY[mine]", "ppo_loss", make_double, new=True)
    with host(entry).patch():
        assert home.REGISTRY["mine"](1) == ("ours", 1, 2)
        with pytest.raises(ValueError, match="x is None"):
            home.REGISTRY["mine"](None)  # the host has no function of its own to run
    assert list(home.REGISTRY) == ["double", "other"]


def test_one_entry_of_a_registry(home):
    original = home.double
    entry = DOUBLE._replace(attribute="REGISTRY[double]")
    with host(entry).patch():
        assert home.REGISTRY["double"](1) == home.double(1) == ("ours", 1, 2)
    assert home.REGISTRY["double"] is home.double is original


def test_someone_elses_later_patch_is_left_in_place(home):
    fake = host()
    fake.patch()
    ours = home.double
    home.double = lambda x: ("theirs", ours(x))
    with pytest.warns(UserWarning, match="home.double was replaced by someone else"):
        fake.unpatch()
    assert home.double(2) == ("theirs", 4)


@pytest.mark.parametrize(("version", "warns"), [("1.0.9", 1), ("1.1", 0), ("1.2.9", 0), ("1.3", 1)])
def test_versions_outside_the_tested_range_warn(home, monkeypatch, version, warns):
    monkeypatch.setattr(sys.modules[HOST], "__version__", version)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with host().patch():
            assert home.double(1) == ("ours", 1, 2)
    assert len(caught) == warns
    if warns:
        assert f"{version} is outside the range" in str(caught[0].message)
        assert "1.1 to 1.2" in str(caught[0].message)


def test_a_host_that_is_not_installed_is_an_import_error():
    with pytest.raises(ImportError, match="no_such_host is not installed"):
        Host("no_such_host", ()).patch()


def test_threads_share_one_application(home):
    fake, original, seen = host(), home.double, []
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


def test_found_reads_versions_without_importing_hosts(monkeypatch):
    versions = {"trl": "1.16.4", "verl": "0.8.0"}
    monkeypatch.setattr(_hosts, "installed", versions.get)
    table = _hosts.found()
    assert table["trl"] == {"version": "1.16.4", "tested": "1.16", "in_tested_range": True}
    assert table["verl"]["in_tested_range"] is False
    assert table["openrlhf"]["version"] is None
    assert table["openrlhf"]["in_tested_range"] is False


def test_importing_an_integration_imports_no_host():
    code = (
        "import sys, fastrlhf.integrations.trl, fastrlhf.integrations.transformers;"
        "print(sorted({'trl', 'transformers', 'verl', 'openrlhf', 'accelerate'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
