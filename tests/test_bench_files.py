"""What the benchmarks make of finished runs: comparison, tables, figures, trained heads."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("tqdm")

from bench import compare
from bench.accuracy import Case, accuracy_methods, measure_case, threshold
from bench.compare import changes
from bench.methods import METHODS, PACKAGES, UnsupportedError, installed
from bench.problems import Config, Problem, make_problem
from bench.results import Results, commit_text, load
from bench.speed import Work, measure
from bench.tables import FROM_FILES, TABLES, documents, rewrite
from bench.timing import KINDS, Timer
from bench.trained_head import TrainedHead, harvest, load_head, tokenize
from examples.model import LanguageModel

ROOT = Path(__file__).resolve().parent.parent
TINY = Config("tiny", 32, 500, 16, "float32")
CPU = torch.device("cpu")


class _Bar:
    def set_postfix_str(self, text: str) -> None: ...

    def update(self) -> None: ...


def run(*methods: str) -> Results:
    """A run on a tiny problem, with every section that has rows."""
    results = Results.start(CPU, "bench")
    work = Work(methods, ("loss-fw", "loss-fw-bw"), memory=False, quick=True)
    results.add("speed", measure(TINY, work, Timer(CPU)))
    problem = make_problem(TINY, "cpu")
    case = Case("tiny", problem.e, problem.c, problem.targets)
    results.add("accuracy", measure_case(case, accuracy_methods(methods, (10,)), _Bar()))
    return results


def test_documents_agree_with_the_committed_runs() -> None:
    blocks = 0
    for path in documents():
        text = path.read_text(encoding="utf-8")
        assert rewrite(text) == text, f"{path.name}: run `python -m bench.tables`"
        for kind, file in re.findall(r"<!-- table: (\w+) (\S+) -->", text):
            blocks += (ROOT / file).exists()
            assert kind in TABLES | FROM_FILES
        assert text.count("<!-- table:") == text.count("<!-- end of table -->"), path.name
    assert blocks >= 1


def test_a_run_names_the_library_that_was_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def git(*arguments: str) -> str:
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org", *arguments]
        return subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout

    def measured(built: str | None) -> tuple[dict, str]:
        facts = {} if built is None else {"git_commit": built}
        monkeypatch.setattr("bench.results.build_info", lambda: facts)
        machine = Results.start(CPU, "bench").machine
        keys = ("commit", "commit_of", "checkout")
        return {key: machine[key] for key in keys if key in machine}, commit_text(machine)

    monkeypatch.setattr("bench.results.ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    elsewhere = "0123456789ab"
    of_library = ({"commit": elsewhere, "commit_of": "library"}, f"commit {elsewhere}")
    assert measured(elsewhere) == of_library  # no history here
    assert measured(None) == ({"commit": "unknown", "commit_of": "unknown"}, "commit unknown")

    git("init")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    for message in ("first", "second"):
        git("commit", "--allow-empty", "-m", message)
    first, second = (git("rev-parse", "--short=12", name).strip() for name in ("HEAD~", "HEAD"))
    assert measured(elsewhere) == of_library  # another history
    assert measured(None)[0] == {"commit": second, "commit_of": "checkout"}
    assert measured(second) == ({"commit": second, "commit_of": "library"}, f"commit {second}")
    (tmp_path / "file").write_text("two")
    for built in (first, f"{first}-dirty"):
        facts, text = measured(built)
        assert facts == {"commit": built, "commit_of": "library", "checkout": f"{second}-dirty"}
        assert text == f"commit {built} (Python files: {second}-dirty)"


def test_tables_change_with_the_run(tmp_path: Path) -> None:
    results = run("cce", "eager")
    results.save(tmp_path / "run.json")
    document = "before\n<!-- table: steps run.json -->\nold\n<!-- end of table -->\nafter\n"
    text = rewrite(document, tmp_path)
    assert "old" not in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    row = next(r for r in results.sections["speed"] if r["kind"] == "loss-fw-bw")
    row["runtime_ms"] = 123456.0
    results.save(tmp_path / "run.json")
    assert rewrite(text, tmp_path) != text
    assert "123,456" in rewrite(text, tmp_path)
    assert rewrite(document, tmp_path / "nowhere") == document
    for make in TABLES.values():
        assert make(load(tmp_path / "run.json")).count("|") > 10


def test_a_failing_method_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(problem: Problem) -> torch.Tensor:
        raise RuntimeError("out of\nluck")

    monkeypatch.setitem(METHODS, "quack-kernels", broken)
    rows = measure(TINY, Work(("quack-kernels", "cce"), KINDS, False, True), Timer(CPU))
    errors = {row["method"]: row.get("error") for row in rows}
    assert errors == {"matmul": None, "quack-kernels": "RuntimeError: out of luck", "cce": None}
    assert all(row["runtime_ms"] > 0 for row in rows if row["method"] == "cce")


@pytest.mark.parametrize(
    "options", [{}, {"softcap": 5.0}, {"rank": 4}, {"softcap": 5.0, "rank": 4}]
)
@pytest.mark.parametrize("data", ["random", "llm"])
def test_methods_compute_the_same(options: dict, data: str) -> None:
    problem = make_problem(TINY._replace(data=data, **options), "cpu")
    expected = METHODS["eager"](problem)
    gradients = torch.autograd.grad(expected, problem.leaves())
    assert len(gradients) == (3 if problem.lora_a is not None else 2)
    for name in installed():
        # Compiling is slow, and is done elsewhere; other packages' kernels are for GPUs.
        if name in ("eager", "torch_compile") or name in PACKAGES:
            continue
        try:
            loss = METHODS[name](problem)
        except UnsupportedError:
            assert options
            continue
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
        for x, y in zip(torch.autograd.grad(loss, problem.leaves()), gradients, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


def test_accuracy_sees_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    cce = METHODS["cce"]
    monkeypatch.setitem(METHODS, "cce_exact", lambda problem: 1.01 * cce(problem))
    rows = {row["method"]: row for row in run("cce", "cce_exact").sections["accuracy"]}
    assert rows["cce"]["de_error"] < 1e-5
    assert rows["cce_exact"]["loss_error"] == pytest.approx(0.01, rel=1e-3)
    assert rows["cce_exact"]["dc_error"] == pytest.approx(0.01, rel=1e-3)
    assert threshold(rows["cce, eps 2^-10"]) == 10
    assert threshold(rows["cce"]) == 0


def test_compare_reports_what_is_beyond_the_spread() -> None:
    old = run("cce", "eager")
    for row in old.sections["speed"]:
        row |= {"spread": 0.05, "extra_mb": 100.0}
    assert changes(old, copy.deepcopy(old)) == []
    new = copy.deepcopy(old)
    slower, faster, larger, wrong = (
        new.sections["speed"][1], new.sections["speed"][2], new.sections["speed"][3],
        new.sections["accuracy"][1],
    )  # fmt: skip
    slower["x_matmul"] *= 1.04
    assert changes(old, new) == []
    slower["x_matmul"] *= 1.04
    faster["x_matmul"] *= 0.9
    larger["extra_mb"] += 10
    wrong["de_error"] += 1e-3
    del new.sections["speed"][4]
    found = {(change.quantity, change.worse) for change in changes(old, new)}
    assert found == {
        ("x_matmul", True), ("x_matmul", False), ("extra_mb", True), ("de_error", True), ("row", False),
    }  # fmt: skip
    new.sections["speed"][1]["error"] = "OutOfMemoryError"
    assert any(c.quantity == "error" and c.worse for c in changes(old, new))


def test_compare_command_fails_where_something_got_worse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old = run("cce")
    old.save(tmp_path / "old.json")
    old.sections["speed"][1]["x_matmul"] *= 100
    old.save(tmp_path / "new.json")
    for pair, code in (("old old", 0), ("old new", 1), ("new old", 0)):
        files = [str(tmp_path / f"{name}.json") for name in pair.split()]
        monkeypatch.setattr(sys, "argv", ["bench.compare", *files])
        with pytest.raises(SystemExit) as exit_:
            compare.main()
        assert int(exit_.value.code) == code
        assert f"{code} worse" in capsys.readouterr().out


def test_tokens_of_pieces_and_bytes() -> None:
    texts = ["def f(x):\n    return x_1\n"] * 80 + ["ünïque"]
    training, held_out, vocab = tokenize(texts, 512)
    assert vocab <= 512
    assert int(training.max()) < vocab
    # Texts 0, 40 and 80 are held out; nobody has seen the last one's pieces, so it is bytes.
    assert len(training) == 78 * 11
    assert len(held_out) == 2 * 11 + len("ünïque".encode())
    assert torch.equal(held_out[:11], training[:11])
    assert held_out[22:].tolist() == [vocab - 256 + byte for byte in "ünïque".encode()]


def test_head_files(tmp_path: Path) -> None:
    np = pytest.importorskip("numpy")
    torch.manual_seed(0)
    model = LanguageModel(300, 16, 64, 1, 1)
    head = harvest(model, torch.randint(300, (400,)), 40, 16, CPU)
    assert head.e.shape == (40, 64)
    assert head.c.shape == (300, 64)
    assert head.targets.shape == (40,)
    torch.save(head._asdict(), tmp_path / "head.pt")
    folder = tmp_path / "npy"
    folder.mkdir()
    for name, part in (("c0", head.c[:200]), ("c1", head.c[200:]), ("e", head.e)):
        np.save(folder / f"head_{name}.npy", part.contiguous().view(torch.int16).numpy())
    np.save(folder / "head_t.npy", head.targets.int().numpy())
    for path in (tmp_path / "head.pt", folder):
        found = load_head(path)
        assert isinstance(found, TrainedHead)
        for x, y in zip(found, head, strict=True):
            assert torch.equal(x, y)
    with pytest.raises(FileNotFoundError, match="bench.trained_head"):
        load_head(tmp_path / "none")


def test_the_committed_figure_is_the_scripts(tmp_path: Path) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    from bench.plots import save
    from docs.figures.how_it_works import draw

    committed = ROOT / "docs" / "figures" / "how_it_works.svg"
    if f"Matplotlib v{matplotlib.__version__}," not in committed.read_text(encoding="utf-8"):
        pytest.skip("drawn by another matplotlib, which has other numbers at the axes")

    def texts(path: Path) -> list[str]:
        return re.findall(r"<text[^>]*>([^<]*)", path.read_text(encoding="utf-8"))

    (_, drawn) = save(draw(), tmp_path, "how_it_works")
    assert texts(drawn) == texts(committed)
    assert any(text.startswith("kept: ") for text in texts(drawn))


@pytest.mark.slow
def test_full_run_draws_its_figures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    command = [
        sys.executable, "-m", "bench.full", "--quick", "--device", "cpu", "--out", str(tmp_path),
        "--methods", "cce", "eager", "--parts", "speed", "accuracy", "scaling", "--train-seconds", "1",
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    results = load(tmp_path / "results.json")
    assert set(results.sections) == {"speed", "accuracy", "roof", "scaling"}
    assert str(tmp_path) not in results.command
    names = ("speed", "scaling_n", "scaling_v", "scaling_d", "roofline", "accuracy", "thresholds")
    for name in names:
        for kind in ("png", "svg"):
            assert (tmp_path / f"{name}.{kind}").stat().st_size > 1000
    for make in TABLES.values():
        assert make(results).count("\n|") >= 2
