"""Runs: one forward for all analyses, the same bytes however a run was computed, one sentence for what goes wrong."""

import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
import torch
from attnlab_kernels import Emit
from torch import Tensor

import attnlab
from attnlab.capture.call import Call, Site
from attnlab.errors import AttnlabError, DataError, RunFolderError
from attnlab.results import NamedArray, Result, heads_frame
from attnlab.runs.analysis import Analysis, Batch, Layout, Needs


class FirstKey(Analysis):
    """Mean attention to the first key, by a key probe: small enough to check by hand."""

    name: ClassVar[str] = "first_key"
    summary: ClassVar[str] = "mean attention to the first key"

    def __init__(self, layout: Layout, factor: float = 1.0) -> None:
        super().__init__(layout)
        self.factor = factor
        heads = layout.heads["self"]
        self.total = torch.zeros(len(heads), heads[0], dtype=torch.float64)
        self.count = torch.zeros((), dtype=torch.int64)

    def needs(self, site: Site, batch: Batch) -> Needs | None:
        if site.kind != "self":
            return None
        return Needs(Emit(key_probes=torch.eye(site.n_keys)[:, :1]))

    def update(self, call: Call, batch: Batch) -> None:
        assert call.emitted.key_probes is not None
        mass = call.emitted.key_probes[..., 0].double() * batch.attention_mask[:, None]
        self.total[call.layer] += self.factor * (mass.sum(-1) / batch.attention_mask.sum(-1)[:, None]).sum(0)
        if call.layer == 0:
            self.count += len(batch.index)

    def merge(self, other: Self) -> None:
        self.total += other.total
        self.count += other.count

    def state_dict(self) -> dict[str, Tensor]:
        return {"total": self.total, "count": self.count}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.total, self.count = state["total"].clone(), state["count"].clone()

    def result(self) -> Result:
        mean = (self.total / self.count).numpy()
        n = int(self.count)
        rows = [(*at, "self", self.name, float(v), float("nan"), n) for at, v in np.ndenumerate(mean)]
        flat = [(layer, head, *rest) for layer, head, *rest in rows]
        arrays = {"mass": NamedArray(mean, ("layer", "head"))}
        return Result(self.name, (f"{n} sequences.",), heads_frame(flat), pd.DataFrame({"n": [n]}), arrays)

    @classmethod
    def figures(cls, result: Result) -> dict[str, go.Figure]:
        return {}


class Losses(FirstKey):
    """Also takes the loss, and remembers what it was given."""

    name: ClassVar[str] = "losses"
    seen: ClassVar[list[Tensor | None]] = []

    def needs(self, site: Site, batch: Batch) -> Needs | None:
        need = super().needs(site, batch)
        return None if need is None else Needs(need.emit, loss=True)

    def end_batch(self, batch: Batch, loss: Tensor | None) -> None:
        self.seen.append(loss)


class NoLoss(FirstKey):
    """Does not ask for the loss."""

    name: ClassVar[str] = "no_loss"
    seen: ClassVar[list[Tensor | None]] = []

    def end_batch(self, batch: Batch, loss: Tensor | None) -> None:
        self.seen.append(loss)


class ForOthers(FirstKey):
    """Fits no model."""

    name: ClassVar[str] = "for_others"

    @classmethod
    def refusal(cls, layout: Layout) -> str | None:
        return "it needs images."


class Unfinished(Analysis):
    """Lacks every method."""

    name: ClassVar[str] = "unfinished"


@pytest.fixture(scope="module")
def model(tiny_checkpoint_of_ids: Path) -> attnlab.Model:
    return attnlab.load_model(tiny_checkpoint_of_ids)


@pytest.fixture(scope="module")
def ids() -> list[list[int]]:
    """40,000 tokens: three chunks."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(200, 512, (110,), generator=generator).tolist()
    return [torch.randint(0, 32, (n,), generator=generator).tolist() for n in lengths]


def _bytes(folder: Path) -> dict[str, bytes]:
    files = [*(folder / "tables").iterdir(), *(folder / "arrays").iterdir()]
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(files)}


@pytest.fixture(scope="module")
def straight(model: attnlab.Model, ids: list[list[int]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("runs") / "straight"
    attnlab.analyze(model, ids, analyses=[FirstKey, "entropy"], out=folder)
    assert len(list((folder / "chunks").iterdir())) == 3
    return folder


def test_a_run_agrees_with_eager_matrices(model: attnlab.Model, ids: list[list[int]]) -> None:
    some = ids[:5]
    run = attnlab.analyze(model, some, analyses=[FirstKey])
    from transformers import GPT2LMHeadModel

    eager = GPT2LMHeadModel(model.hf.config)
    eager.load_state_dict(model.hf.state_dict())
    eager.eval().set_attn_implementation("eager")
    masses = []
    for row in some:
        with torch.no_grad():
            patterns = eager(torch.tensor([row]), output_attentions=True).attentions
        masses.append(torch.stack(patterns)[:, 0, :, :, 0].double().mean(-1))
    expected = torch.stack(masses).mean(0)
    np.testing.assert_allclose(run["first_key"].arrays["mass"].values, expected.numpy(), atol=1e-6)


def _assert_same_values(run: attnlab.Run, other: attnlab.Run) -> None:
    np.testing.assert_allclose(run.heads["value"], other.heads["value"], rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(run.heads["stderr"], other.heads["stderr"], rtol=1e-4, atol=1e-6)


def test_batch_sizes_agree(model: attnlab.Model, ids: list[list[int]]) -> None:
    some = [row[: 20 + 3 * i] for i, row in enumerate(ids[:13])]
    one, four, any_size = (attnlab.analyze(model, some, batch_size=size) for size in (1, 4, None))
    _assert_same_values(four, one)
    _assert_same_values(any_size, one)


def test_one_chunk_and_several_agree(model: attnlab.Model, ids: list[list[int]]) -> None:
    short = [row[start : start + 30] for row in ids for start in range(0, 180, 30)]
    several, one = (attnlab.analyze(model, short, batch_size=size) for size in (60, len(short)))
    assert several.config["batching"]["chunk_size"] < len(short)
    assert one.config["batching"]["chunk_size"] == len(short)
    _assert_same_values(several, one)


def test_several_analyses_agree_with_separate_runs(model: attnlab.Model, ids: list[list[int]]) -> None:
    together = attnlab.analyze(model, ids[:12], analyses=[FirstKey, "entropy", "sinks"])
    for analysis in (FirstKey, "entropy", "sinks"):
        alone = attnlab.analyze(model, ids[:12], analyses=[analysis])
        (name,) = alone.results
        np.testing.assert_allclose(together[name].heads["value"], alone[name].heads["value"], rtol=1e-5, atol=1e-6)


def test_all_analyses_share_one_forward_without_logits(model: attnlab.Model, ids: list[list[int]]) -> None:
    body, head = [], []
    hooks = [
        model.hf.base_model.register_forward_hook(lambda *_: body.append(1)),
        model.hf.lm_head.register_forward_hook(lambda *_: head.append(1)),
    ]
    attnlab.analyze(model, ids[:6], analyses=[FirstKey, "entropy", "sinks"], batch_size=2)
    for hook in hooks:
        hook.remove()
    assert len(body) == 3
    assert head == []


def test_the_loss_reaches_those_who_ask_and_is_the_models_own(model: attnlab.Model, ids: list[list[int]]) -> None:
    Losses.seen.clear()
    NoLoss.seen.clear()
    attnlab.analyze(model, ids[:1], analyses=[NoLoss, Losses])
    assert NoLoss.seen == [None]
    (loss,) = Losses.seen
    assert loss is not None
    row = torch.tensor(ids[:1])
    with torch.no_grad():
        expected = model.hf(row, labels=row).loss
    torch.testing.assert_close(loss.mean(), expected, rtol=1e-5, atol=1e-5)


def test_a_run_in_memory_and_one_in_a_folder_agree(model: attnlab.Model, ids: list[list[int]], straight: Path) -> None:
    loaded = attnlab.load_run(straight)
    run = attnlab.analyze(model, ids, analyses=[FirstKey, "entropy"])
    pd.testing.assert_frame_equal(run.heads, loaded.heads)
    assert loaded.findings == run.findings
    assert loaded.config == run.config
    assert run.path is None
    assert run.report_path is None


def test_run_json_tells_configuration_throughput_and_memory(straight: Path) -> None:
    run = attnlab.load_run(straight)
    assert run.config["analyses"][0]["options"] == {"factor": 1.0}
    assert run.config["data"]["sequences"] == 110
    assert run.performance["tokens_per_second"] > 0
    assert run.performance["peak_memory_bytes"] > 2**20
    assert run.report_path == straight / "report.html"
    assert "110 sequences" in repr(run)
    assert "<script" not in run._repr_html_()


def test_an_interrupted_run_goes_on_to_the_same_bytes(
    model: attnlab.Model, ids: list[list[int]], straight: Path, tmp_path: Path
) -> None:
    class InterruptError(Exception):
        pass

    def stop(*_: object) -> None:
        if len(list((tmp_path / "chunks").glob("*.safetensors"))) == 2:
            raise InterruptError

    hook = model.hf.base_model.register_forward_hook(stop)
    with pytest.raises(InterruptError):
        attnlab.analyze(model, ids, analyses=[FirstKey, "entropy"], out=tmp_path)
    hook.remove()
    assert not (tmp_path / "tables").exists()
    with pytest.raises(RunFolderError, match="not finished"):
        attnlab.load_run(tmp_path)
    forwards = []
    hook = model.hf.base_model.register_forward_hook(lambda *_: forwards.append(1))
    run = attnlab.analyze(model, ids, analyses=[FirstKey, "entropy"], out=tmp_path)
    hook.remove()
    assert _bytes(tmp_path) == _bytes(straight)
    assert "arrays/sequences.safetensors" in _bytes(straight)
    assert run.performance["tokens_computed"] < sum(map(len, ids)) / 2
    assert forwards


def test_a_finished_run_is_not_computed_again(model: attnlab.Model, ids: list[list[int]], straight: Path) -> None:
    before, performance = _bytes(straight), attnlab.load_run(straight).performance
    forwards = []
    hook = model.hf.base_model.register_forward_hook(lambda *_: forwards.append(1))
    run = attnlab.analyze(model, ids, analyses=[FirstKey, "entropy"], out=straight)
    hook.remove()
    assert _bytes(straight) == before
    assert run.performance == performance
    assert len(forwards) < 10  # the report reads a few texts


@pytest.mark.parametrize("damage", [b"", b"\x00" * 100, None], ids=["empty", "zeros", "cut"])
def test_a_damaged_chunk_is_computed_again(
    damage: bytes | None, model: attnlab.Model, ids: list[list[int]], straight: Path
) -> None:
    before = _bytes(straight)
    chunk = straight / "chunks" / "000001.safetensors"
    chunk.write_bytes(chunk.read_bytes()[:-7] if damage is None else damage)
    attnlab.analyze(model, ids, analyses=[FirstKey, "entropy"], out=straight)
    assert _bytes(straight) == before


_KILLED = """
import pathlib, sys
import attnlab
attnlab.analyze(sys.argv[1], sys.argv[2], analyses=["entropy", "sinks"], out=sys.argv[3], progress=False)
"""


def test_a_killed_run_goes_on_to_the_same_bytes(
    tiny_checkpoint_of_ids: Path, ids: list[list[int]], tmp_path: Path
) -> None:
    data = tmp_path / "ids.json"
    data.write_text(str(ids))

    killed, straight = tmp_path / "killed", tmp_path / "straight"
    arguments = [str(tiny_checkpoint_of_ids), str(data), str(killed)]
    command = [sys.executable, "-c", _KILLED, *arguments]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        first = killed / "chunks" / "000000.safetensors"
        while not first.exists():
            assert process.poll() is None, "the run ended without a chunk"
            time.sleep(0.001)
        process.kill()
    assert not (killed / "tables").exists()
    for out in (killed, straight):
        attnlab.analyze(str(tiny_checkpoint_of_ids), data, analyses=["entropy", "sinks"], out=out)
    assert _bytes(killed) == _bytes(straight)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"seed": 1}, r"the seed \(0 there, 1 asked for\)"),
        ({"batch_size": 3}, "the batch size"),
        ({"analyses": ["entropy"]}, r"the analyses \(first_key, entropy there, entropy asked for\)"),
        ({"analyses": {"entropy": {}}}, "the analyses"),
        ({"limit": 7}, "the data .*7 sequences"),
        ({"backend": "dense"}, "the backend"),
        ({"dtype": "float64"}, "the dtype"),
    ],
)
def test_the_folder_of_another_run_is_refused_by_what_differs(
    changed: dict[str, object],
    says: str,
    tiny_checkpoint_of_ids: Path,
    ids: list[list[int]],
    straight: Path,
) -> None:
    before = _bytes(straight)
    options: dict[str, object] = {"analyses": [FirstKey, "entropy"], **changed}
    with pytest.raises(RunFolderError, match=says):
        attnlab.analyze(str(tiny_checkpoint_of_ids), ids, out=straight, **options)  # type: ignore[arg-type]
    assert _bytes(straight) == before


def test_options_differ_too(model: attnlab.Model, tmp_path: Path) -> None:
    attnlab.analyze(model, [[1, 2, 3]], analyses={"sinks": {}}, out=tmp_path)
    with pytest.raises(RunFolderError, match="options or code of sinks"):
        attnlab.analyze(model, [[1, 2, 3]], analyses={"sinks": {"threshold": 0.5}}, out=tmp_path)


def test_a_resume_takes_the_recorded_threads(model: attnlab.Model, ids: list[list[int]], straight: Path) -> None:
    before, threads = _bytes(straight), torch.get_num_threads()
    (straight / "chunks" / "000002.safetensors").unlink()
    torch.set_num_threads(threads + 1)
    try:
        with pytest.warns(attnlab.AttnlabWarning, match=f"started with {threads} threads"):
            attnlab.analyze(model, ids, analyses=[FirstKey, "entropy"], out=straight)
        assert torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)
    assert _bytes(straight) == before


def test_fresh_starts_again_and_keeps_other_files(model: attnlab.Model, tmp_path: Path) -> None:
    attnlab.analyze(model, [[1, 2, 3]], analyses=["entropy", FirstKey], out=tmp_path)
    (tmp_path / "notes.md").write_text("mine")
    attnlab.analyze(model, [[4, 5]], analyses=[FirstKey], out=tmp_path, resume=False)
    assert sorted(_bytes(tmp_path)) == [
        "arrays/first_key.safetensors",
        "tables/first_key.parquet",
        "tables/heads.parquet",
    ]
    assert (tmp_path / "notes.md").read_text() == "mine"


def test_a_run_leaves_the_callers_random_numbers_alone(model: attnlab.Model) -> None:
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    attnlab.analyze(model, [[1, 2, 3]], analyses=[FirstKey])
    assert torch.equal(torch.randn(3), expected)


def test_an_encoder_decoder_gives_all_kinds_of_heads(tiny_encoder_decoder: Path, tmp_path: Path) -> None:
    with pytest.warns(attnlab.AttnlabWarning, match="no column 'target'"):
        run = attnlab.analyze(str(tiny_encoder_decoder), ["the cat sat", "a dog"], out=tmp_path, analyses=["entropy"])
    assert set(run.heads["kind"]) == {"self", "cross", "encoder"}
    rows = [{"text": "the cat sat", "target": "a"}, {"text": "a dog", "target": "then a bird sat"}]
    other = attnlab.analyze(str(tiny_encoder_decoder), rows, analyses=["entropy"])
    assert other.heads.shape == run.heads.shape


def test_memory_that_does_not_suffice_suggests_a_smaller_batch(model: attnlab.Model) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    hook = model.hf.base_model.register_forward_hook(fail)
    try:
        with pytest.raises(AttnlabError, match=r"batch of 4 sequences of 3 tokens; give a smaller --batch-size .*=2"):
            attnlab.analyze(model, [[1, 2, 3]] * 4, analyses=[FirstKey])
    finally:
        hook.remove()


@contextmanager
def small_disk() -> Iterator[None]:
    """No file of this process may grow beyond 1000 bytes, pytest's own included, which fails as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_one_sentence_and_leaves_no_half_file(model: attnlab.Model, tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="No space is left") as caught, small_disk():
        attnlab.analyze(model, [[1, 2, 3]], analyses=["entropy"], out=tmp_path)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("*.tmp"))


def test_an_analysis_that_does_not_fit_is_refused_when_asked_for(model: attnlab.Model) -> None:
    with pytest.raises(AttnlabError, match="'for_others' does not fit tiny-gpt2: it needs images"):
        attnlab.analyze(model, [[1]], analyses=[ForOthers])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"analyses": ["entropi"]}, "Did you mean entropy"),
        ({"analyses": []}, "No analysis"),
        ({"analyses": {"sinks": {"treshold": 1}}}, "Did you mean threshold"),
        ({"analyses": [int]}, "not an analysis"),
        ({"analyses": 3}, "A list of analyses"),
        ({"analyses": {"sinks": None}}, "options of 'sinks' should be a mapping"),
        ({"analyses": {"sinks": {"threshold": "high"}}}, "threshold of the sinks"),
        ({"analyses": {"sinks": {"threshold": 30}}}, "threshold of the sinks"),
        ({"analyses": [Unfinished]}, "'unfinished' cannot be set up: TypeError"),
        ({"batch_size": "all"}, "batch size is 'all'; a whole number"),
        ({"limit": 1.5}, "limit is 1.5; a whole number"),
        ({"max_length": "8"}, "maximum length is '8'; a whole number"),
        ({"seed": None}, "seed is None; a whole number"),
        ({"batch_size": 0}, "batch size"),
        ({"limit": 0}, "limit"),
        ({"max_length": 0}, "maximum length"),
        ({"backend": "flash"}, "no backend 'flash'"),
    ],
)
def test_bad_options_are_one_sentence(options: dict[str, object], says: str, model: attnlab.Model) -> None:
    with pytest.raises(AttnlabError, match=says):
        attnlab.analyze(model, [[1, 2]], **options)  # type: ignore[arg-type]


def test_a_run_without_this_analysis_says_which_it_has(straight: Path) -> None:
    with pytest.raises(AttnlabError, match="it has first_key, entropy"):
        attnlab.load_run(straight)["sinks"]


def test_a_run_tells_its_analyses(straight: Path) -> None:
    run = attnlab.load_run(straight)
    assert list(run) == ["first_key", "entropy"]
    assert "entropy" in run
    assert "sinks" not in run


@pytest.mark.parametrize(
    "damage",
    [
        {"context": {"threads": 0}},
        {"context": {"threads": "two"}},
        {"config": {"batching": {"batch_size": None, "batch_tokens": 4096, "chunk_size": 0}}},
        {"config": {"batching": {"batch_size": None, "batch_tokens": "4096", "chunk_size": 8}}},
        {"config": {"analyses": None}},
    ],
)
def test_a_damaged_description_is_one_sentence_and_a_fresh_start_mends_it(
    damage: dict[str, dict[str, object]], model: attnlab.Model, tmp_path: Path
) -> None:
    attnlab.analyze(model, [[1, 2, 3]], analyses=["entropy"], out=tmp_path)
    description = json.loads((tmp_path / "run.json").read_text())
    for part, changes in damage.items():
        description[part] |= changes
    (tmp_path / "run.json").write_text(json.dumps(description))
    with pytest.raises(RunFolderError, match="--fresh"):
        attnlab.analyze(model, [[1, 2, 3]], analyses=["entropy"], out=tmp_path)
    attnlab.analyze(model, [[1, 2, 3]], analyses=["entropy"], out=tmp_path, resume=False)
    assert "entropy" in attnlab.load_run(tmp_path)


def test_a_run_of_another_format_is_neither_gone_on_with_nor_loaded(model: attnlab.Model, tmp_path: Path) -> None:
    attnlab.analyze(model, [[1, 2, 3]], analyses=["entropy"], out=tmp_path)
    description = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(description | {"attnlab_run": 99}))
    with pytest.raises(RunFolderError, match="format 99"):
        attnlab.load_run(tmp_path)
    with pytest.raises(RunFolderError, match="format 99"):
        attnlab.analyze(model, [[1, 2, 3]], analyses=["entropy"], out=tmp_path)
    assert attnlab.analyze(model, [[1, 2, 3]], analyses=["entropy"], out=tmp_path, resume=False).path == tmp_path


def test_a_run_without_a_list_of_analyses_is_not_loaded(model: attnlab.Model, tmp_path: Path) -> None:
    attnlab.analyze(model, [[1, 2, 3]], analyses=["entropy"], out=tmp_path)
    description = json.loads((tmp_path / "run.json").read_text())
    del description["config"]["analyses"]
    (tmp_path / "run.json").write_text(json.dumps(description))
    with pytest.raises(RunFolderError, match="shape that attnlab writes"):
        attnlab.load_run(tmp_path)


def test_bad_data_leaves_no_folder_behind(model: attnlab.Model, tmp_path: Path) -> None:
    with pytest.raises(DataError):
        attnlab.analyze(model, [[99]], out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.fixture
def third_party(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package with one analysis that works, one that does not import, one that is none."""
    about = tmp_path / "site" / "others-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: others\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(
        "[attnlab.analyses]\nbroken = others_absent:X\nnone = json:dumps\nown = others_own:Own\n"
        "other_name = others_own:Own\nstops = others_own:Stops\n"
    )
    (tmp_path / "site" / "others_own.py").write_text(
        "from dataclasses import replace\nfrom attnlab.results import Metric\n"
        "from attnlab_analyses.entropy import Entropy\nclass Own(Entropy):\n    name = 'own'\n"
        "    def result(self):\n        metrics = {'entropy': Metric('Spread as others say', 'nats', high=99.0)}\n"
        "        return replace(super().result(), metrics=metrics)\n"
        "class Stops(Own):\n    name = 'stops'\n    @classmethod\n    def refusal(cls, layout): return 1 / 0\n"
    )
    monkeypatch.syspath_prepend(tmp_path / "site")


@pytest.mark.usefixtures("third_party")
def test_another_packages_analyses_are_found_and_broken_ones_said(model: attnlab.Model) -> None:
    from attnlab.runs.registry import analysis_names, choose_studies

    assert {"broken", "entropy", "none", "own", "sinks"} <= set(analysis_names())
    studies, notes = choose_studies(None, model.layout)
    assert {"budgets", "entropy", "own", "patterns", "roles", "sinks"} == {study.name for study in studies}
    assert any("'broken' (others_absent:X) cannot be loaded" in note for note in notes)
    assert any("json:dumps is not an analysis" in note for note in notes)
    assert any("registered as 'other_name' and calls itself 'own'" in note for note in notes)
    assert any("'stops' cannot be set up: ZeroDivisionError" in note for note in notes)
    with pytest.raises(AttnlabError, match="cannot be loaded"):
        choose_studies(["broken"], model.layout)


@pytest.mark.usefixtures("third_party")
def test_what_another_package_calls_its_metrics_outlives_it(
    model: attnlab.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = attnlab.analyze(model, [[1, 2, 3, 4]], analyses=["own"], out=tmp_path / "run")
    assert run.metrics["entropy"].title == "Spread as others say"
    assert run["own"].plot("entropy").layout.title.text == "Spread as others say"
    assert ">Spread as others say</button>" in run.report_path.read_text()  # type: ignore[union-attr]
    assert ">Effective keys</button>" in run.report_path.read_text()  # type: ignore[union-attr]
    monkeypatch.undo()
    assert "own" not in attnlab.runs.registry.analysis_names()
    figure = attnlab.load_run(tmp_path / "run")["own"].plot("entropy")
    assert (figure.layout.title.text, figure.data[0].zmax) == ("Spread as others say", 99.0)
