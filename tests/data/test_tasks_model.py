"""The shipped `tasks` model does what its card says, on a small sample; its truth is what patching finds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from attnlab import AttnlabError
from attnlab.attribution import activation_patching
from attnlab.tasks import TASKS, read_truth, score
from attnlab.tasks.draw import part_of
from attnlab.tasks.ioi import TEMPLATES
from attnlab.tasks.words import NAMES
from attnlab.verify.tasks import truth_prompts

MODEL = Path(__file__).parents[2] / "data" / "models" / "tasks"
MEGABYTE = 2**20


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


@pytest.mark.parametrize(
    ("words", "templates"), [("held_out", "train"), ("train", "held_out"), ("held_out", "held_out")]
)
@pytest.mark.parametrize("name", TASKS)
def test_it_solves_prompts_of_words_and_templates_that_it_never_saw_in_prompts(
    model, tokenizer, name, words, templates
):
    found = score(model, TASKS[name](tokenizer, 100, seed=99, words=words, templates=templates))
    assert found.accuracy >= 0.95
    assert found.clean > found.corrupted


def test_random_weights_of_its_shape_solve_nothing(model, tokenizer):
    torch.manual_seed(0)
    untrained = type(model)(model.config).eval()
    shares = [score(untrained, make(tokenizer, 50, seed=1)).accuracy for make in TASKS.values()]
    assert max(shares) < 0.85
    assert np.mean(shares) < 0.6


@pytest.mark.parametrize("name", ["ioi", "subject_verb_agreement"])
def test_its_truth_is_what_patching_finds(model, tokenizer, name):
    truth = read_truth("tasks")
    prompts = truth_prompts(name, tokenizer, truth)
    found = activation_patching(
        model, prompts.clean, prompts.corrupted, prompts.metric, direction="noise", batch_size=512
    )
    heads = truth.heads(name)
    assert heads["effect"].to_numpy() == pytest.approx(found.table["effect"].to_numpy(), abs=1e-3)
    assert heads["matters"].any()
    assert not heads["matters"].all()
    width = (heads["high"] - heads["low"]).to_numpy()
    assert width == pytest.approx(2 * 1.96 * found.table["stderr"].to_numpy(), rel=0.35, abs=2e-3)


def test_edges_of_its_truth_are_what_path_patching_finds(script, model, tokenizer):
    patching, name = script("path_patching"), "ioi"
    truth = read_truth(MODEL)
    prompts = truth_prompts(name, tokenizer, truth)
    table = truth.edges(name)
    every = patching.edges(model)
    assert len(table) == len(every)
    strongest = table["effect"].abs().sort_values(ascending=False).index[:6]
    base, source = (patching.record(model, ids) for ids in (prompts.input_ids, prompts.corrupted_ids))
    chosen = [every[i] for i in strongest]
    patched = patching.patch_edges(model, base, source, prompts.metric, prompts.attention_mask, chosen)
    clean, corrupted = (
        prompts.metric(model(ids).logits, prompts.rows).detach() for ids in (prompts.input_ids, prompts.corrupted_ids)
    )
    effects = (patched - clean).mean(1) / (corrupted - clean).mean()
    assert effects.numpy() == pytest.approx(table["effect"][strongest].to_numpy(), abs=1e-3)


def test_the_truth_of_a_folder_without_one_is_refused(tmp_path):
    with pytest.raises(AttnlabError, match=r"has no truth\.json"):
        read_truth(tmp_path)
    (tmp_path / "truth.json").write_text('{"rule": {}}')
    with pytest.raises(AttnlabError, match="is not what"):
        read_truth(tmp_path)
    with pytest.raises(AttnlabError, match="No task 'chess' was measured"):
        read_truth(MODEL).heads("chess")


def test_a_unit_matters_by_its_effect_and_its_interval(tmp_path):
    rows = {
        "L0H0": [0.06, 0.01, 0.1],
        "L0H1": [0.06, -0.01, 0.1],
        "L1H0": [0.05, 0.04, 0.06],
        "L1H1": [-0.3, -0.4, -0.2],
    }
    of = {
        "clean": 1.0,
        "corrupted": 0.0,
        "heads": rows,
        "edges": {"L1H1.q": {"embed": [0.9, 0.8, 1.0]}, "logits": rows},
    }
    (tmp_path / "truth.json").write_text(json.dumps({"rule": {"threshold": 0.05}, "tasks": {"ioi": of}}))
    truth = read_truth(tmp_path)
    assert truth.heads("ioi")["matters"].tolist() == [True, False, False, True]
    edges = truth.edges("ioi")
    assert edges.iloc[0][["sender", "receiver", "input"]].tolist() == ["embed", "L1H1", "q"]
    assert edges["matters"].tolist() == [True, True, False, False, True]
    assert edges["input"].tolist() == ["q", "", "", "", ""]


def test_its_folder_is_small_and_its_tokenizer_knows_the_words(tokenizer):
    files = [path for path in MODEL.glob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 2.5 * MEGABYTE
    assert {path.suffix for path in files} <= {".json", ".md", ".safetensors"}
    assert tokenizer("The war of 1732").input_ids == tokenizer.convert_tokens_to_ids(
        ["<s>", "The", "war", "of", "17", "32"]
    )
    assert all(len(tokenizer(name, add_special_tokens=False).input_ids) == 1 for name in part_of(NAMES, "all"))


def test_its_batches_hold_no_held_out_words_or_templates_as_prompts(script, tokenizer):
    batches = script("tasks_batches")
    stage = script("shipped_batches").Stage(1, 2, 128, echo=0.0, recall=0.0, random_repeats=0.0, text_repeats=0.0)
    part = batches.Part(stage, task_rows=3)
    batches.POOL, batches.SENTENCE_POOL = 200, 200
    mixture = batches.Mixture(np.arange(4, len(tokenizer)), tokenizer, seed=0)
    held_out = set(tokenizer.convert_tokens_to_ids(list(part_of(NAMES, "held_out"))))
    for prompts in mixture.pools["ioi"]:
        assert not held_out & set(prompts.input_ids.flatten().tolist())
        assert set(prompts.templates.tolist()) == set(part_of(range(len(TEMPLATES)), "train"))
    first, again = (mixture.batch(part, step=7) for _ in range(2))
    assert first.ids.shape == (5, 128)
    assert torch.equal(first.ids, again.ids)
    assert not torch.equal(first.ids, mixture.batch(part, step=8).ids)


def test_segments_of_a_row_do_not_see_each_other(script, model, tokenizer):
    batches = script("tasks_batches")
    one, two = (np.array(tokenizer(text).input_ids) for text in ("The war began in 17", "I saw Mary today."))
    kinds = [np.full(len(ids), batches.OF_REST) for ids in (one, two)]
    packed = batches._packed([[batches.Segment(ids, kind) for ids, kind in zip((one, two), kinds, strict=True)]])
    together = model(input_ids=packed.ids, attention_mask=packed.mask).logits[0]
    for ids, at in ((one, 0), (two, len(one))):
        alone = model(input_ids=torch.from_numpy(ids)[None]).logits[0]
        assert torch.allclose(together[at : at + len(ids)], alone, atol=1e-3)


def test_every_lookup_asks_for_what_its_kind_says(script, tokenizer):
    lookups = script("tasks_lookups").Lookups(tokenizer)
    rng, comma = np.random.default_rng(0), tokenizer.convert_tokens_to_ids(",")
    signs = set(tokenizer.convert_tokens_to_ids(["?", "\n", "A", ":", "is", "to", "param"]))
    lookups.ordinary = np.setdiff1d(lookups.ordinary, [*signs, comma])  # so that the test can tell a question's parts
    for _ in range(50):
        for kind, offset in (("before", -1), ("after", 2)):
            ids, known = getattr(lookups, kind)(rng)
            for at in np.flatnonzero(known):
                asked = next(ids[j] for j in range(at - 1, 0, -1) if ids[j] not in signs)
                earlier = int(np.flatnonzero(ids == asked)[0])
                assert ids[earlier + offset] == ids[at]
        ids, known = lookups.mirrored(rng)
        triples = ids[1:].reshape(-1, 3)
        assert (triples[:, 2] == comma).all()
        seen = [set(map(int, pair)) for pair in triples[:, :2]]
        for i, is_known in enumerate(known[1:].reshape(-1, 3)[:, 1]):
            assert bool(is_known) == (seen[i] in seen[:i])
