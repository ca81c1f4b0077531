"""The command line, mostly in a process of its own: what it writes, whoever reads what it prints."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import dag_hesse as dh
from dag_hesse._cli.spec import load_spec
from dag_hesse.cli import main, parser

BLOCKS = ("blocks", "mlp", "--batch", "6", "--image", "4")


def run(*arguments: str, tail: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    command = " ".join([sys.executable, "-m", "dag_hesse", *arguments, tail])
    encoding = environment.setdefault("PYTHONIOENCODING", "utf-8")
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"],
        capture_output=True,
        encoding=encoding,
        env={**os.environ, **environment},
    )


def test_blocks_are_stored(tmp_path: Path) -> None:
    done = run(*BLOCKS, "--error", "0.05", "--band", "1", "--out", str(tmp_path / "b.safetensors"))
    assert done.returncode == 0, done.stderr
    stored = dh.BlockMatrix.load(tmp_path / "b.safetensors")
    assert stored.names == ("1", "3", "5")
    assert str(stored) in done.stdout
    assert stored["1", "5"].kind.value == "zero"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--part", "tensor"), "zero"),  # a ReLU network has none
        (("--error", "2"), "below 1"),
        (("--size", "much"), "4GiB"),
        (("--band", "1", "--eps", "0.1"), "pass one"),
        (("--points", "nope"), "nope"),
    ],
)
def test_what_cannot_be_stored_is_told(
    arguments: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*BLOCKS, *arguments, "--out", str(tmp_path / "b.safetensors")]) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_reader_that_goes_away_takes_no_file_with_it(tmp_path: Path) -> None:
    done = run("analyze", "mlp", "--batch", "6", "--image", "4", "--json", str(tmp_path / "a.json"), tail="| head -c 1")
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "a.json").exists()


def test_a_terminal_of_few_letters() -> None:
    done = run(*BLOCKS, PYTHONIOENCODING="latin-1")
    assert done.returncode == 0, done.stderr
    assert "directions" in done.stdout


SMALL = ("mlp", "--batch", "6", "--image", "2")


def operator(kind: type = dh.HessianOperator, points: list[str] | None = None) -> dh.HessianOperator:
    return kind(*load_spec("mlp", 6, 2, 0), points=points)


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    assert main([*arguments, "--json", "-"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return json.loads(out)


@pytest.mark.parametrize(("part", "kind"), [("full", dh.HessianOperator), ("gn", dh.GGNOperator)])
def test_a_product_with_a_vector_of_a_file(
    part: str, kind: type, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    H = operator(kind)
    v = H.by_name(torch.randn(H.shape[0]))
    save_file(v, tmp_path / "v.safetensors")
    files = ["--vector", str(tmp_path / "v.safetensors"), "--out", str(tmp_path / "Hv.safetensors")]
    data = said(capsys, "hvp", *SMALL, "--part", part, *files)
    product = H @ v
    written = load_file(tmp_path / "Hv.safetensors")
    assert set(written) == set(product)
    for row in data["segments"]:
        name = row["name"]
        assert torch.equal(written[name], product[name])
        assert row["vector"] == pytest.approx(float(v[name].double().norm()))
        assert row["product"] == pytest.approx(float(product[name].double().norm()))
    flat = [torch.cat([x[name].double().flatten() for name in H.names]) for x in (v, product)]
    assert data["inner"] == pytest.approx(float(flat[0] @ flat[1]), rel=1e-4, abs=1e-6)
    assert data["product"] == pytest.approx(float(flat[1].norm()))


def test_a_random_product_is_the_same_twice_and_told_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["hvp", *SMALL, "--points", "6.weight", "6.bias", "--seed", "3"]
    first = said(capsys, *command)
    assert said(capsys, *command) == first
    assert said(capsys, *command[:-1], "4")["product"] != first["product"]
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["point", "6.weight", "6.bias", "all"]
    assert lines[1].split()[1] == "10×256"


def test_vectors_that_do_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"6.bias": torch.ones(3)}, tmp_path / "short")
    save_file({"7.bias": torch.ones(10)}, tmp_path / "other")
    (tmp_path / "text").write_text("1 2 3")
    for name, message in (("none", "MissingFile"), ("text", "safetensors"), ("other", "7.bias"), ("short", "(3,)")):
        command = ["hvp", *SMALL, "--points", "6.bias", "--vector", str(tmp_path / name)]
        assert main([*command, "--out", str(tmp_path / "Hv")]) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "Hv").exists()


@pytest.mark.parametrize("points", [["6.bias"], ["0.weight", "6.weight"]])  # all eigenvalues, and by Lanczos
def test_the_ends_of_the_spectrum(points: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    H = operator(points=points)
    exact = torch.linalg.eigvalsh(H.dense().double())
    data = said(capsys, "spectrum", *SMALL, "--points", *points, "--top", "3", "--bottom", "2", "--tol", "1e-6")
    assert data["size"] == len(exact)
    assert data["top"] == pytest.approx(exact.flip(0)[:3].tolist(), rel=1e-3, abs=1e-5)
    assert data["bottom"] == pytest.approx(exact[:2].tolist(), rel=1e-3, abs=1e-5)
    grid, density = (torch.tensor(data[name]) for name in ("grid", "density"))
    assert float(torch.trapezoid(density, grid)) == pytest.approx(1.0, abs=0.05)


def test_a_spectrum_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["spectrum", *SMALL, "--points", "6.weight", "--steps", "20", "--top", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "2560 eigenvalues" and len(lines[1].split()) == 3
    shares = [float(line.split()[1].rstrip("%")) for line in lines[5:]]
    assert len(shares) == 20 and sum(shares) == pytest.approx(100.0, abs=0.1)
    assert lines[5 + shares.index(max(shares))].count("█") >= 25


def test_json_on_the_standard_output_is_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    data = said(capsys, "analyze", *SMALL, "--html", str(page))
    assert [point["name"] for point in data["points"]] == ["1", "3", "5"]
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert "predicted" in json.dumps(said(capsys, "profile", *SMALL))


def completed(line: str, shell_script: str) -> list[str]:
    """What bash offers for the last word of a line."""
    words = line.split(" ")
    quoted = " ".join(f"'{word}'" for word in words)
    tail = f"COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; _dag_hesse; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    done = subprocess.run(["bash", "-c", f"{shell_script}\n{tail}"], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_tab_completes_commands_options_and_choices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    commands = next(a for a in parser()._actions if a.dest == "command").choices
    assert set(completed("dag-hesse ", script)) >= set(commands)
    assert completed("dag-hesse pro", script) == ["profile"]
    assert completed("dag-hesse analyze res", script) == ["resnet18", "resnet18-silu", "resnet50"]
    assert completed("dag-hesse analyze mlp --mo", script) == ["--mode"]
    assert completed("dag-hesse analyze mlp --mode ", script) == ["auto", "exact", "gram", "probes"]
    (tmp_path / "vector.safetensors").touch()
    assert completed(f"dag-hesse hvp mlp --vector {tmp_path}/v", script) == [f"{tmp_path}/vector.safetensors"]
    for name, command in commands.items():
        for action in command._actions:
            assert all(option in completed(f"dag-hesse {name} x --", script) for option in action.option_strings[-1:])
    assert main(["completion", "zsh"]) == 0
    assert capsys.readouterr().out.endswith(script)


def test_fish_completes_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "fish"]) == 0
    script = capsys.readouterr().out
    commands = next(a for a in parser()._actions if a.dest == "command").choices
    for name, command in commands.items():
        assert f"complete -c dag-hesse -n '__fish_use_subcommand' -a {name} -d " in script
        for action in command._actions:
            for option in action.option_strings:
                inside = f"complete -c dag-hesse -n '__fish_seen_subcommand_from {name}' -l {option[2:]}"
                assert not option.startswith("--") or inside in script
    assert "from analyze' -l mode -x -a 'auto exact gram probes' -d 'how norms are obtained'" in script
    assert "%(" not in script and "%%" not in script


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")
def test_fish_takes_its_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "fish"]) == 0
    script, fish = capsys.readouterr().out, str(shutil.which("fish"))
    place = tmp_path / "dag-hesse.fish"
    place.write_text(script)
    for line, expected in (
        ("dag-hesse pro", "profile"),
        ("dag-hesse analyze mlp --mode gr", "gram"),
        ("dag-hesse analyze res", "resnet50"),
    ):
        ask = [fish, "--no-config", "-c", f"source {place}; complete -C '{line}'"]
        done = subprocess.run(
            ask, capture_output=True, text=True, check=True, env={**os.environ, "HOME": str(tmp_path)}
        )
        assert expected in [row.split("\t")[0] for row in done.stdout.splitlines()]


def test_two_saved_reports_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    batch = torch.randn(5, 3), torch.tensor([0, 1, 0, 1, 1])
    places = [str(tmp_path / f"{k}.safetensors") for k in range(2)]
    reports = []
    for place in places:
        reports.append(dh.analyze(net, batch, points=["0", "1"], mode="probes", probes=8))
        reports[-1].save(place)
        net[0].weight.data.mul_(2)
    page = tmp_path / "changes.html"
    assert main(["compare", *places, "--html", str(page), "--json", "-"]) == 0
    data = json.loads(capsys.readouterr().out)
    expected = reports[0].compare(reports[1])
    for row in data["metrics"]["resonance"]:
        i, j = (expected.names.index(row[side]) for side in "vw")
        assert row["difference"] == pytest.approx(reports[1].resonance[i, j] - reports[0].resonance[i, j], rel=1e-12)
        assert row["score"] == pytest.approx(expected.score["resonance"][i, j], rel=1e-12) and row["changed"]
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert main(["compare", places[0], places[0], "--metric", "coupling"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[-1] == "+0.0"
    assert main(["compare", places[0], "nope"]) == 1
    assert "MissingFileError" in capsys.readouterr().err


def test_memory_has_a_unit(capsys: pytest.CaptureFixture[str]) -> None:
    assert parser().parse_args(["analyze", "mlp", "--memory", "2GiB"]).memory == 2 << 30
    for wrong, told in (("4", "4GiB"), ("much", "4GiB"), ("0MB", "500MB")):
        with pytest.raises(SystemExit) as ended:
            main(["analyze", "mlp", "--memory", wrong])
        assert ended.value.code == 2 and told in capsys.readouterr().err


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands that fail the test where they begin to work."""

    def begun(*_: object) -> None:
        pytest.fail("the work has begun")

    for place in ("dag_hesse.cli.built", "dag_hesse._cli.products.built", "dag_hesse.monitor.demo.digits"):
        monkeypatch.setattr(place, begun)


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("analyze mlp", "--json"),
        ("analyze mlp", "--html"),
        ("profile mlp", "--json"),
        ("profile mlp", "--trace"),
        ("hvp mlp", "--out"),
        ("blocks mlp", "--out"),
        ("spectrum mlp", "--json"),
        ("monitor-demo", "--out"),
    ],
)
def test_what_cannot_be_written_is_found_before_the_work(
    command: str, option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    for place, kind in ((tmp_path / "folder.png", "OptionError"), (tmp_path / "file" / "a.png", "WriteError")):
        assert main([*command.split(), option, str(place)]) == 1
        out, err = capsys.readouterr()
        assert (out, err[: err.index(str(place))].split()[:2]) == ("", ["dag-hesse:", f"{kind}:"])


@pytest.mark.usefixtures("idle")
def test_a_folder_of_results_is_looked_at_before_the_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "results" / "report.html").mkdir(parents=True)
    for place, wrong in (("file", "file/report.json"), ("results", "results/report.html")):
        assert main(["analyze", "mlp", "--out", str(tmp_path / place)]) == 1
        assert str(tmp_path / wrong) in capsys.readouterr().err


def test_json_goes_through_a_pipe_that_the_shell_has_opened(tmp_path: Path) -> None:
    done = run("analyze", *SMALL, "--quiet", "--json", f">(cat > {tmp_path}/a.json; echo done >&2)", tail="| cat")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "done\n")
    assert len(json.loads((tmp_path / "a.json").read_text())["points"]) == 3


def test_standard_output_by_its_name_is_not_begun_anew(tmp_path: Path) -> None:
    done = run("analyze", *SMALL, "--json", "/dev/stdout", tail=f"> {tmp_path}/all")
    assert (done.returncode, done.stderr) == (0, "")
    data, _, text = (tmp_path / "all").read_text(encoding="utf-8").partition("\n}\n")
    assert len(json.loads(data + "}")["points"]) == 3 and text.startswith("Sequential: 3 activation points")


@pytest.mark.parametrize(
    ("tail", "told", "kept"),
    [
        (">&-", "standard output is closed", False),
        ("1< {folder}/file", "standard output cannot be written: Bad file descriptor", True),  # open for reading alone
    ],
)
@pytest.mark.parametrize("command", [("hvp", *SMALL), ("blocks", *SMALL)])
def test_a_standard_output_that_takes_nothing(
    command: tuple[str, ...], tail: str, told: str, kept: bool, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    done = run(*command, "--out", str(tmp_path / "made"), tail=tail.format(folder=tmp_path))
    assert done.returncode == 1
    assert done.stderr.startswith(f"dag-hesse: WriteError: {told}") and len(done.stderr.splitlines()) == 1
    assert (tmp_path / "made").exists() == kept  # files are written before anything is printed


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_a_command_that_is_quiet_needs_no_streams(closed: str, tmp_path: Path) -> None:
    done = run("analyze", *SMALL, "--quiet", "--json", str(tmp_path / "a.json"), tail=closed)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert len(json.loads((tmp_path / "a.json").read_text())["points"]) == 3


def test_an_error_without_a_standard_error_is_a_code_alone() -> None:
    done = run("hvp", "nope", tail="2>&-")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")


@pytest.mark.parametrize("spec", [":build", ".models:build", "a..b:build", "models:", "models"])
def test_a_spec_of_another_form_is_told(spec: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["hvp", spec]) == 1
    assert f"OptionError: SPEC '{spec}' is neither built in nor of the form module:callable" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["analyze", "blocks", "hvp", "spectrum", "profile"])
def test_a_seed_of_too_many_digits_is_told(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    for sign in "", "-":
        assert main([command, *SMALL, f"--seed={sign}99999999999999999999999"]) == 1
        assert (
            f"OptionError: seed={sign}99999999999999999999999; expected an integer of 64 bits"
            in capsys.readouterr().err
        )


def test_a_model_that_no_memory_holds_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    for size in (10**9, 2**62):
        assert main(["hvp", "mlp", "--batch", str(size), "--image", "1000"]) == 1
        assert f"--batch {size} and --image 1000" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["hvp", "mlp", "--batch", str(2**63)])


def test_help_has_examples_that_parse(capsys: pytest.CaptureFixture[str]) -> None:
    import shlex

    for name in ("hvp", "spectrum"):
        with pytest.raises(SystemExit):
            main([name, "--help"])
        examples = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  dag-hesse ")]
        assert len(examples) == 3
        for line in examples:
            assert parser().parse_args(shlex.split(line)[1:]).command == name


def test_the_monitor_s_demo_draws_its_curves(tmp_path: Path) -> None:
    place = tmp_path / "figures" / "monitor.png"
    done = run("monitor-demo", "--seconds", "1", "--every", "5", "--out", str(place))
    assert done.returncode == 0, done.stderr
    assert place.read_bytes().startswith(b"\x89PNG")
    for text in ("step 0: loss", "sharpness", "held-out digits are read right", str(place)):
        assert text in done.stdout
