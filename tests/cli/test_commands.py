import json
import sys
from dataclasses import dataclass
from types import ModuleType

import pytest

from logitcache.cli import main
from logitcache.stage_one.cluster.cluster import Cluster
from logitcache.student.evaluation.cost import LatencyPlan


@dataclass(frozen=True)
class Result:
    out: str
    top1: float = 0.5
    shards_left = 0


@dataclass(frozen=True)
class Measured(Result):
    epoch: int = 1
    teachers_failed: tuple[str, ...] = ()
    per_class: tuple[()] = ()


@pytest.fixture
def verb(monkeypatch):
    """Replace a verb by one that records its arguments; its module needs not be imported."""

    def verb(module, name, result):
        calls = []

        def record(*args, **kwargs):
            calls.append((args, kwargs))
            return result

        stand_in = ModuleType(module)
        setattr(stand_in, name, record)
        monkeypatch.setitem(sys.modules, module, stand_in)
        return calls

    return verb


@pytest.fixture
def recipe(tmp_path):
    def recipe(text):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return str(path)

    return recipe


PRECOMPUTE = "cache: a.zarr\nteachers: {t: {model: {kind: small_cnn}}}\n"
DERIVE = "cache: a.zarr\nout: b.zarr\nteachers: {t: {logits: {kind: top_k, k: 5}}}\n"
STUDENT = "cache: a.zarr\nout: runs/s\nepochs: 2\nmodel: {kind: small_cnn}\n"
TEACHER = "dataset: {kind: bundled}\nout: runs/t\nepochs: 2\nmodel: {kind: small_cnn}\n"
KINDS = {"precompute": PRECOMPUTE, "derive": DERIVE, "train-student": STUDENT, "train-teacher": TEACHER}


def test_precompute_runs_the_recipe_with_its_overrides(capsys, monkeypatch, recipe):
    seen, parts = [], []

    def run(plan, part, wait, scheduler, workers):
        seen.append(plan)
        parts.append((part, wait))
        return Result(plan.cache)

    monkeypatch.setattr("logitcache.stage_one.precompute.precompute", run)
    path = recipe(PRECOMPUTE)
    assert main(["precompute", path, "--set", "cache=b.zarr", "--set", "batch_size=7"]) == 0
    assert (seen[0].cache, seen[0].batch_size) == ("b.zarr", 7)
    assert capsys.readouterr().out == "out   b.zarr\ntop1  0.5\n"
    assert main(["precompute", path, "--part", "2/8"]) == 0
    assert main(["precompute", path, "--wait"]) == 0
    assert parts == [(None, False), ("2/8", False), (None, True)]


@pytest.mark.parametrize("command", ["precompute", "derive"])
@pytest.mark.parametrize(
    ("held", "apart", "why", "fix"),
    [
        (2, 0, "2 held by other running processes", "--wait, to wait for these processes; or once they have ended"),
        (1, 0, "1 held by other running processes, 1 held by no process", "--wait"),
        (0, 2, "2 left to other parts", "the same command computes what is free"),
        (0, 0, "2 held by no process", "the same command computes what is free"),
    ],
)
def test_a_cache_that_is_not_whole_is_no_success_but_of_a_part(
    capsys, monkeypatch, recipe, command, held, apart, why, fix
):
    from logitcache.stage_one.precompute import PrecomputeResult

    filled = PrecomputeResult("c.zarr", 6, 4, 2, 0, 0, 0.0, 0, held, apart)
    module = {"precompute": "logitcache.stage_one.precompute", "derive": "logitcache.stage_one.derive.derive"}[command]
    monkeypatch.setattr(f"{module}.{command}", lambda plan, **options: filled)
    path = recipe(KINDS[command])
    assert main([command, path, "--part", "2/8"]) == 0
    assert capsys.readouterr().err == f"c.zarr is not whole yet: 2 of 6 shards are not committed ({why})\n"
    assert main([command, path]) == 75
    assert f"c.zarr is not whole: 2 of 6 shards are not committed ({why}). Fix: {fix}" in capsys.readouterr().err
    assert main([command, path, "--json"]) == 75
    found = json.loads(capsys.readouterr().out)
    assert (found["shards_left"], found["shards_held"], found["error"]["exit_code"]) == (2, held, 75)


def test_train_student_passes_its_options_on(capsys, verb, recipe):
    calls = verb("logitcache.student.training", "train", Result("runs/s"))
    assert main(["train-student", recipe(STUDENT), "--resume", "--verify", "numeric", "--json"]) == 0
    (args, kwargs), *_ = calls
    assert (args[0].cache, args[0].verify) == ("a.zarr", "numeric")
    assert kwargs == {"resume": True, "live": None}
    assert json.loads(capsys.readouterr().out) == {"out": "runs/s", "top1": 0.5}


def test_online_training_asks_the_live_teachers(verb, recipe):
    live = verb("logitcache.teacher.online", "live_targets", "live")
    calls = verb("logitcache.student.training", "train", Result("runs/s"))
    assert main(["train-student", recipe(STUDENT), "--online"]) == 0
    assert calls[0][1]["live"] == "live"
    assert live == [(("a.zarr", "auto", {}), {"trust": ()})]


def test_train_teacher_runs_the_same_loop(verb, recipe):
    calls = verb("logitcache.student.training", "train", Result("runs/t"))
    assert main(["train-teacher", recipe(TEACHER), "--set", "epochs=5", "-q"]) == 0
    assert calls[0][0][0].epochs == 5
    assert calls[0][1] == {"resume": False}


def test_evaluate_passes_what_to_time_on(tmp_path, monkeypatch):
    plans = []

    def evaluate(run, overrides, latency, teachers_from):
        assert teachers_from is None
        plans.append(latency)
        return Measured(str(run))

    monkeypatch.setattr("logitcache.report.beside_teachers.evaluate_beside_teachers", evaluate)
    assert main(["evaluate", str(tmp_path), "--set", "validation.every=2"]) == 0
    assert main(["evaluate", str(tmp_path), "--latency"]) == 0
    sizes = ["--batch-size", "4", "--batch-size", "8", "--threads", "1", "--repeats", "3", "--warm-up", "2"]
    assert main(["evaluate", str(tmp_path), "--latency", *sizes]) == 0
    assert main(["evaluate", str(tmp_path), "--latency", "--batch-size", "0"]) == 2
    assert [plan and plan.model_dump() for plan in plans] == [
        None,
        {"batch_sizes": (1, 32), "threads": (), "warm_up": 5, "repeats": 30},
        {"batch_sizes": (4, 8), "threads": (1,), "warm_up": 2, "repeats": 3},
    ]


@pytest.mark.parametrize("option", ["--batch-size", "--threads", "--repeats", "--warm-up"])
def test_evaluate_takes_no_option_of_a_timing_that_is_not_asked_for(option, tmp_path, capsys):
    assert main(["evaluate", str(tmp_path), option, "1"]) == 2
    message = capsys.readouterr().err
    assert f"'{option}'" in message
    assert "nothing is timed without --latency" in message
    assert len(message.splitlines()) == 2


def test_evaluate_shows_how_it_times_by_default(capsys):
    plan = LatencyPlan()
    assert main(["evaluate", "--help"]) == 0
    text = capsys.readouterr().out
    for shown in (", ".join(map(str, plan.batch_sizes)), plan.repeats, plan.warm_up):
        assert f"[default: ({shown});" in " ".join(text.split())


def test_inspect_and_summary_and_demo_call_their_verbs(tmp_path, verb):
    summarized = verb("logitcache.report.summary", "summarize", Result("a.zarr"))
    inspected = verb("logitcache.report.inspect", "inspect_cache", {"views": 4})
    told = verb("logitcache.report.demo.demo", "run_demo", Result("demo"))
    assert main(["summary", str(tmp_path)]) == main(["summary", str(tmp_path), "--views", "2"]) == 0
    assert summarized == [((str(tmp_path), None, Cluster()), {}), ((str(tmp_path), 2, Cluster()), {})]
    assert main(["summary", str(tmp_path), "--workers", "2"]) == 0
    assert main(["summary", str(tmp_path), "--scheduler", "tcp://a:1"]) == 0
    assert [call[0][2] for call in summarized[2:]] == [Cluster(workers=2), Cluster("tcp://a:1")]
    assert main(["inspect", str(tmp_path)]) == 0
    assert inspected == [((str(tmp_path),), {})]
    assert main(["demo", "--out", str(tmp_path)]) == 0
    assert told == [((tmp_path,), {"quick": False})]


def test_verify_tells_every_problem_once_and_exits_3(capsys, monkeypatch, tmp_path):
    from logitcache.report.verify_and_repair import VerifyResult

    problems = ("shard 0 differs " + "x" * 300, "shard 1 is gone")
    result = VerifyResult("a.zarr", 2, 10, "not compared", "the cache is damaged", problems, "mend it")
    monkeypatch.setattr("logitcache.report.verify_and_repair.verify", lambda *args: result)
    assert main(["verify", str(tmp_path), "--set", "dataset.root=x"]) == 3
    out, err = capsys.readouterr()
    assert "shards" in out
    assert out.endswith("".join(f"{problem}\n" for problem in problems))
    assert err == "Error: a.zarr: the cache is damaged (2 problems). Fix: mend it\n"
    assert main(["verify", str(tmp_path), "--json"]) == 3
    document = json.loads(capsys.readouterr().out)
    assert tuple(document["problems"]) == problems
    assert document["error"]["message"] == "a.zarr: the cache is damaged (2 problems). Fix: mend it"


def test_a_folder_that_is_no_cache_is_refused_with_exit_3(capsys, tmp_path):
    assert main(["verify", str(tmp_path)]) == 3
    assert str(tmp_path) in capsys.readouterr().err


def test_recipe_check_knows_the_kinds(capsys, tmp_path):
    for name, text in KINDS.items():
        (tmp_path / name).write_text(text)
    assert main(["recipe", "check", *(str(tmp_path / name) for name in KINDS)]) == 0
    assert capsys.readouterr().out.splitlines() == [f"OK {tmp_path / name} ({name})" for name in KINDS]


@pytest.mark.parametrize("wanted", ["plan", *KINDS])
def test_a_recipe_of_another_command_is_told_as_that(capsys, recipe, wanted):
    own = "precompute" if wanted == "plan" else wanted
    for kind, text in KINDS.items():
        if kind != own:
            path = recipe(text)
            assert main([wanted, path]) == 2
            err = capsys.readouterr().err
            assert err.startswith(f"Error: {path} looks like a recipe of `{kind}`")
            assert f"takes one of `{own}`: it " in err
            assert f"Fix: run `logitcache {kind} {path}`" in err
            assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("command", "text", "expected"),
    [
        ("precompute", PRECOMPUTE + "out: x\n", "'out' = \"x\": unknown key"),
        ("precompute", PRECOMPUTE + "epochs: 2\n", "'epochs' = 2: unknown key"),
        ("train-student", STUDENT.replace("epochs", "epoch"), "did you mean 'epochs'?"),
        ("train-teacher", TEACHER.replace("dataset: {kind: bundled}\n", ""), "'dataset' is missing"),
        ("precompute", "a: 1\na: 2\n", "key 'a' appears twice"),
        ("derive", "a: 1\n", "'teachers' is missing"),
        ("train-student", STUDENT + "losses: [{kind: kl_divergence, a: 1, b: 2, c: 3, d: 4, e: 5}]\n", "5 mistakes"),
    ],
)
def test_a_mistake_in_a_recipe_of_the_command_stays_one(capsys, recipe, command, text, expected):
    assert main([command, recipe(text)]) == 2
    err = capsys.readouterr().err
    assert expected in err
    assert "looks like" not in err


def test_recipe_check_reports_every_mistake_of_every_file(capsys, tmp_path):
    good, bad, worse, other = (tmp_path / f"{name}.yaml" for name in ("good", "bad", "worse", "x"))
    good.write_text(STUDENT)
    bad.write_text(STUDENT.replace("epochs", "epoch") + "emma: 0.9\n")
    worse.write_text("teacher: {}\ncache: 3\n")
    other.write_text("colour: red\n")
    paths = [str(path) for path in (good, bad, worse, other, tmp_path / "absent.yaml")]
    assert main(["recipe", "check", *paths, "--json"]) == 2
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert [r["error"] is None for r in document["recipes"]] == [True, False, False, False, False]
    assert [r["command"] for r in document["recipes"]][:3] == [
        "train-student",
        "train-student",
        "precompute",
    ]
    for expected in ("'epochs'?", "'ema'?", "'teachers'?", "no recipe has these keys", "no such"):
        assert expected in err
    assert document["error"]["exit_code"] == 2


def test_env_is_shown_as_text_and_as_json(capsys):
    assert main(["env"]) == 0
    assert "libraries.torch" in capsys.readouterr().out
    assert main(["env", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["libraries"]["zarr"]
