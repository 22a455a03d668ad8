"""The command: what it prints, its exit codes, and one sentence without a traceback for every bad input."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import pytest

from attnlab.cli import main

TEXTS = ["the cat sat on the old mat", "a dog saw a bird", "then the bird sat by the red door and saw a cat"]


class Said(NamedTuple):
    """What a command printed and its exit code."""

    code: int
    out: str
    err: str


Command = Callable[..., Said]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    """Runs `attnlab` in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)

    def run(*arguments: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["attnlab", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        said = capfd.readouterr()
        return Said(end.value.code if isinstance(end.value.code, int) else 0, said.out, said.err)

    return run


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "texts.json"
    path.write_text(json.dumps(TEXTS))
    return path


def test_analyze_writes_tables_and_report_and_says_what_it_found(
    command: Command, tiny_checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    said = command("analyze", tiny_checkpoint, "-d", data, "-o", "out", "-a", "entropy")
    assert said.code == 0, said.err
    heads = pd.read_parquet(tmp_path / "out" / "tables" / "heads.parquet")
    assert list(heads.columns) == ["layer", "head", "kind", "metric", "value", "stderr", "n"]
    assert set(heads["n"]) == {3}
    assert (tmp_path / "out" / "report.html").is_file()
    assert "Report: out/report.html" in said.out
    assert "entropy_normalized" in said.out
    assert "3 sequences" in said.out
    assert said.err == ""


def test_without_a_folder_the_same_command_finds_its_own_run_again(
    command: Command, tiny_checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    for _ in range(2):
        assert command("analyze", tiny_checkpoint, "-d", data, "-a", "entropy").code == 0
    assert command("analyze", tiny_checkpoint, "-d", data, "-a", "entropy", "--limit", "2").code == 0
    folders = sorted(folder.name for folder in (tmp_path / "runs").iterdir())
    assert len(folders) == 2
    assert all(folder.startswith("tiny-llama-") for folder in folders)


def test_sequences_that_are_cut_are_said_and_the_run_goes_on(
    command: Command, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "long.json").write_text(json.dumps(["the cat " * 50, "a dog"]))
    said = command("analyze", tiny_checkpoint, "-d", "long.json", "-o", "out", "-a", "entropy")
    assert said.code == 0
    assert said.err == ("Note: 1 of 2 sequences are longer than the 32 tokens that tiny-llama allows, and are cut.\n")


def _wrong_inputs(checkpoint: Path, of_ids: Path, folder: Path) -> dict[str, tuple[list[object], str]]:
    def write(name: str, content: bytes) -> Path:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        return path

    good = write("good.json", json.dumps(TEXTS).encode())
    shutil.copytree(checkpoint, folder / "no-weights", ignore=shutil.ignore_patterns("*.safetensors"))
    write("unknown-model/config.json", b'{"model_type": "never_heard_of"}')
    write("unknown-model/model.safetensors", b"")
    write("other-run/thesis.tex", b"mine")
    write("a-file", b"")
    return {
        "missing file": ([checkpoint, "-d", "absent.json"], "There is no file"),
        "empty file": ([checkpoint, "-d", write("empty.jsonl", b"")], "is empty"),
        "no sequence": ([checkpoint, "-d", write("none.json", b"[]")], "holds no sequence"),
        "not UTF-8": ([checkpoint, "-d", write("latin.txt", b"caf\xe9")], "not UTF-8 text: byte 0xe9 at offset 3"),
        "JSON of the wrong shape": ([checkpoint, "-d", write("shape.json", b'{"a": 1}')], "a list of strings"),
        "no such column": ([checkpoint, "-d", write("a.jsonl", b'{"a": "b"}'), "--column", "c"], "it has a."),
        "ids outside the vocabulary": ([of_ids, "-d", write("ids.json", b"[[1, 500]]")], "the id 500 is outside"),
        "text without a tokenizer": ([of_ids, "-d", good], "has no tokenizer"),
        "no weights": ([folder / "no-weights", "-d", good], "no-weights"),
        "unsupported model": ([folder / "unknown-model", "-d", good], "unknown-model"),
        "missing model": ([folder / "absent", "-d", good], "absent"),
        "unknown analysis": ([checkpoint, "-d", good, "-a", "entropie"], "Did you mean entropy?"),
        "unknown backend": ([checkpoint, "-d", good, "--backend", "flash"], "no backend 'flash'"),
        "unknown device": ([checkpoint, "-d", good, "--device", "abacus"], "abacus"),
        "unknown dtype": ([checkpoint, "-d", good, "--dtype", "float7"], "float7"),
        "another's folder": ([checkpoint, "-d", good, "-o", folder / "other-run"], "thesis.tex"),
        "another's folder afresh": ([checkpoint, "-d", good, "-o", folder / "other-run", "--fresh"], "thesis.tex"),
        "a file as folder": ([checkpoint, "-d", good, "-o", folder / "a-file"], "is a file"),
        "below a file": ([checkpoint, "-d", good, "-o", folder / "a-file" / "out"], "a-file"),
    }


NAMES = [
    "missing file", "empty file", "no sequence", "not UTF-8", "JSON of the wrong shape", "no such column",
    "ids outside the vocabulary", "text without a tokenizer", "no weights", "unsupported model", "missing model",
    "unknown analysis", "unknown backend", "unknown device", "unknown dtype", "another's folder",
    "another's folder afresh", "a file as folder", "below a file",
]  # fmt: skip


def test_every_bad_input_is_tried(tiny_checkpoint: Path, tmp_path: Path) -> None:
    assert list(_wrong_inputs(tiny_checkpoint, tiny_checkpoint, tmp_path)) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_bad_input_is_one_sentence_and_exit_code_2(
    name: str, command: Command, tiny_checkpoint: Path, tiny_checkpoint_of_ids: Path, tmp_path: Path
) -> None:
    arguments, says = _wrong_inputs(tiny_checkpoint, tiny_checkpoint_of_ids, tmp_path)[name]
    said = command("analyze", *arguments)
    assert said.code == 2
    assert said.out == ""
    assert said.err.startswith("Error: ")
    assert said.err.count("\n") == 1
    assert says in said.err
    assert "Traceback" not in said.err
    if "another" in name:
        assert [p.name for p in (tmp_path / "other-run").iterdir()] == ["thesis.tex"]


def test_the_folder_of_another_run_is_refused_and_fresh_takes_it(
    command: Command, tiny_checkpoint: Path, data: Path
) -> None:
    arguments = ("analyze", tiny_checkpoint, "-d", data, "-o", "out", "-a", "entropy")
    assert command(*arguments).code == 0
    said = command(*arguments, "--limit", "1")
    assert said.code == 2
    assert "belongs to another run, which differs in the data" in said.err
    assert command(*arguments, "--limit", "1", "--fresh").code == 0
    assert set(pd.read_parquet("out/tables/heads.parquet")["n"]) == {1}


@pytest.mark.parametrize(
    "arguments", [("nope",), ("analyze", "--nope"), ("analyze", "--limit", "0"), ("analyze", "--batch-size", "x")]
)
def test_wrong_usage_is_exit_code_2(arguments: tuple[str, ...], command: Command) -> None:
    said = command(*arguments)
    assert said.code == 2
    assert "Error" in said.err
    assert "Traceback" not in said.err


def test_help_names_every_option_and_gives_examples(command: Command) -> None:
    assert "analyze" in command("--help").out
    said = command("analyze", "--help")
    assert said.code == 0
    assert "attnlab analyze gpt2 -d prompts.jsonl -o runs/gpt2" in said.out
    for option in ("--analysis", "--data", "--out", "--column", "--max-length", "--batch-size", "--limit", "--device",
                   "--dtype", "--backend", "--seed", "--resume / --fresh"):  # fmt: skip
        assert option in said.out


def test_what_two_commands_share_is_said_alike(command: Command) -> None:
    def said(name: str) -> dict[str, str]:
        options = " ".join(command(name, "--help").out.split()).split(" --")[1:]
        return {text.split()[0]: text for text in options}

    analyze, experiment = said("analyze"), said("experiment")
    for option in ("column", "max-length", "batch-size", "limit", "device", "dtype"):
        assert analyze[option] == experiment[option]


def test_lists_and_version(command: Command) -> None:
    listed = command("analyses").out
    assert "entropy" in listed
    assert "attention sinks" in listed
    assert command("--version").out.startswith("attnlab 0.")


def test_the_shipped_models_are_listed_with_what_is_known_of_them_and_their_cards(command: Command) -> None:
    said = command("models")
    assert said.code == 0
    assert "known-circuit  an attention-only transformer whose weights are written down" in said.out
    assert "known: the role of every head" in said.out
    assert "197,104 parameters, 0.8 MB" in said.out
    assert command("models", "show", "pydoc-4l").out.count("# pydoc-4l\n") == 1
    for words in (("show", "none-such"), ("verify", "known-circuit", "none-such")):
        said = command("models", *words)
        assert (said.code, said.out) == (2, "")
        assert said.err.startswith("Error: No model named 'none-such' comes with attnlab")


def test_the_model_that_is_analysed_without_a_name_is_pydoc_4l(command: Command, data: Path, tmp_path: Path) -> None:
    assert command("analyze", "-d", data, "-a", "entropy", "--max-length", "8").code == 0
    assert [folder.name.rsplit("-", 1)[0] for folder in (tmp_path / "runs").iterdir()] == ["pydoc-4l"]


def test_control_characters_and_markup_reach_the_terminal_as_text(
    command: Command, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    odd = tmp_path / "[bold]odd\x1b[31m"
    shutil.copytree(tiny_checkpoint, odd)
    (tmp_path / "[red]x.json").write_text('["the cat"]')
    said = command("analyze", odd, "-d", "[red]x.json", "-o", "[red]out", "-a", "entropy")
    assert said.code == 0
    assert "\x1b" not in said.out + said.err
    assert "[red]out" in said.out


def test_a_real_process_interrupted_by_ctrl_c_says_so_and_goes_on(
    command: Command, tiny_checkpoint_of_ids: Path, tmp_path: Path
) -> None:
    (tmp_path / "ids.json").write_text(json.dumps([[i % 32 for i in range(512)]] * 100))
    arguments = ["analyze", str(tiny_checkpoint_of_ids), "-d", "ids.json", "-o", "out", "-a", "entropy"]
    process = subprocess.Popen(
        [sys.executable, "-c", "from attnlab.cli import main; main()", *arguments],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # A process that tests run in may ignore the signal, and its children with it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    while not (tmp_path / "out" / "chunks" / "000000.safetensors").exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130
    assert err == "Interrupted; what is computed is kept in out, and the same command goes on from there.\n"
    assert not (tmp_path / "out" / "tables").exists()
    assert command(*arguments).code == 0
    assert (tmp_path / "out" / "tables" / "heads.parquet").is_file()


def test_importing_attnlab_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, attnlab, attnlab.cli; print(sorted({'torch', 'transformers', 'pandas'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out == "[]\n"


def test_packages_that_are_doors_can_be_called_and_entered() -> None:
    import attnlab
    import attnlab.capture.call

    assert callable(attnlab.capture)
    assert attnlab.capture.call.Head(5, 1) == attnlab.Head(5, 1)
    assert {"analyze", "capture", "load_model", "load_run", "view", "Emit", "__version__"} <= set(dir(attnlab))
    for name in dir(attnlab):
        assert getattr(attnlab, name) is not None
