"""Every task's prompts: aligned, balanced, reproducible, apart where words or templates are held out."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attnlab import AttnlabError
from attnlab.tasks import TASKS, colored_objects, docstring, greater_than, induction, ioi, subject_verb_agreement
from attnlab.tasks.agreement import TEMPLATES as AGREEMENT
from attnlab.tasks.draw import Deck, is_held_out
from attnlab.tasks.ioi import TEMPLATES as IOI
from attnlab.tasks.words import ARGUMENTS, COLORS, EVENTS, NAMES, NOUNS, VERBS

WITH_TEXT = [name for name in TASKS if name != "induction"]
PARTS = st.sampled_from(["train", "held_out", "all"])
FEW = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def words_at(tokenizer, prompts, name):
    ids = prompts.input_ids[torch.arange(len(prompts)), prompts.positions[name]]
    return tokenizer.convert_ids_to_tokens(ids.tolist())


@pytest.mark.parametrize("name", TASKS)
@FEW
@given(seed=st.integers(0, 2**32), n=st.integers(1, 40), words=PARTS, templates=PARTS)
def test_clean_and_corrupted_differ_at_named_positions_only(word_level, name, seed, n, words, templates):
    prompts = TASKS[name](word_level, n, seed=seed, words=words, templates=templates)
    assert len(prompts) == n
    named = torch.zeros_like(prompts.attention_mask)
    for at in prompts.positions.values():
        named[torch.arange(n), at] = True
    differ = prompts.input_ids != prompts.corrupted_ids
    assert differ.any(1).all()
    assert not (differ & ~named).any()
    assert torch.equal(prompts.positions["END"], prompts.rows.last)
    assert not (prompts.input_ids * ~prompts.attention_mask).any()
    answers = [set(row.tolist()) - {-1} for row in prompts.answers]
    wrong = [set(row.tolist()) - {-1} for row in prompts.wrong]
    assert all(right and others and not right & others for right, others in zip(answers, wrong, strict=True))


@pytest.mark.parametrize("name", WITH_TEXT)
def test_ids_are_what_the_tokenizer_makes_of_the_texts(word_level, name):
    prompts = TASKS[name](word_level, 20, templates="all")
    space = "" if name == "greater_than" else " "
    for i, (text, other) in enumerate(zip(prompts.texts, prompts.corrupted_texts, strict=True)):
        mask = prompts.attention_mask[i]
        assert prompts.input_ids[i][mask].tolist() == word_level(text)["input_ids"]
        assert prompts.corrupted_ids[i][mask].tolist() == word_level(other)["input_ids"]
        answer = word_level.convert_ids_to_tokens(int(prompts.answers[i, 0]))
        assert word_level(text + space + answer)["input_ids"][-1] == prompts.answers[i, 0]


@pytest.mark.parametrize("make", [docstring, subject_verb_agreement])
def test_where_a_space_matters_the_answer_is_the_token_with_the_space(bpe, make):
    prompts = make(bpe, 30)
    for i, text in enumerate(prompts.texts):
        ids = prompts.input_ids[i][prompts.attention_mask[i]].tolist()
        assert ids == bpe(text)["input_ids"]
        for answer in [*prompts.answers[i].tolist(), *prompts.wrong[i].tolist()]:
            word = bpe.decode([answer])
            assert word.startswith(" ")
            assert bpe(text + word)["input_ids"] == [*ids, answer]


@pytest.mark.parametrize("name", TASKS)
def test_the_same_seed_gives_the_same_prompts(word_level, name):
    first, again, other = (TASKS[name](word_level, 30, seed=seed) for seed in (5, 5, 6))
    assert first.texts == again.texts
    assert torch.equal(first.corrupted_ids, again.corrupted_ids)
    assert first.texts != other.texts


def test_held_out_words_and_templates_are_in_no_training_prompt(word_level):
    used = {
        part: {
            "IO": ioi(word_level, 200, words=part), "noun": greater_than(word_level, 200, words=part),
            "C_def": docstring(word_level, 200, words=part), "color": colored_objects(word_level, 200, words=part),
            "subject": subject_verb_agreement(word_level, 200, words=part),
        }
        for part in ("train", "held_out")
    }  # fmt: skip
    lists = {"IO": NAMES, "noun": EVENTS, "C_def": ARGUMENTS, "color": COLORS}
    for place, several in lists.items():
        train, held_out = (set(words_at(word_level, used[part][place], place)) for part in ("train", "held_out"))
        expected = {word for i, word in enumerate(several) if is_held_out(i)}
        assert held_out == expected
        assert train == set(several) - expected
    verbs = {word for i, verb in enumerate(VERBS) if is_held_out(i) for word in verb}
    held_out = used["held_out"]["subject"]
    assert set(word_level.convert_ids_to_tokens(held_out.answers[:, 0].tolist())) == verbs
    noun_of = {word: noun for noun in NOUNS for word in noun}
    nouns = {noun for i, noun in enumerate(NOUNS) if is_held_out(i)}
    for place in ("subject", "attractor"):
        assert {noun_of[word] for word in words_at(word_level, held_out, place)} == nouns
        assert {noun_of[word] for word in words_at(word_level, used["train"]["subject"], place)} == {*NOUNS} - nouns
    for name, make in TASKS.items():
        numbers = {part: set(make(word_level, 60, templates=part).templates.tolist()) for part in ("train", "held_out")}
        assert all(numbers.values()), name
        assert not numbers["train"] & numbers["held_out"]


def test_the_held_out_tokens_of_induction_are_apart(word_level):
    seen = {part: set(induction(word_level, 100, words=part, bos=False).input_ids.flatten().tolist()) - {0} for part in
            ("train", "held_out")}  # fmt: skip
    assert not seen["train"] & seen["held_out"]


def spread(items):
    counts = Counter(items).values()
    return max(counts) - min(counts)


def test_names_orders_and_templates_come_equally_often(word_level):
    prompts = ioi(word_level, 4 * 2 * len(IOI), words="held_out")  # of each template in each order four
    assert spread(prompts.variants) == 0
    assert spread(zip(prompts.templates.tolist(), prompts.variants, strict=True)) == 0
    for place in ("IO", "S1"):
        assert len(set(words_at(word_level, prompts, place))) == sum(map(is_held_out, range(len(NAMES))))
        assert spread(words_at(word_level, prompts, place)) <= 2
    first = prompts.positions["IO"] < prompts.positions["S1"]
    assert [bool(x) for x in first] == [variant == "ABBA" for variant in prompts.variants]


def test_years_are_spread_and_the_corrupted_year_is_01(word_level):
    prompts = greater_than(word_level, 97)
    years = [int(word) for word in words_at(word_level, prompts, "YY")]
    assert sorted(years) == list(range(2, 99))
    assert spread(words_at(word_level, prompts, "XX1")) <= 2
    assert words_at(word_level, prompts, "XX1") == words_at(word_level, prompts, "END")
    above = [set(word_level.convert_ids_to_tokens([i for i in row.tolist() if i >= 0])) for row in prompts.answers]
    assert above == [{f"{later:02d}" for later in range(year + 1, 100)} for year in years]
    corrupted = prompts.corrupted_ids[torch.arange(97), prompts.positions["YY"]]
    assert set(word_level.convert_ids_to_tokens(corrupted.tolist())) == {"01"}


def test_the_answers_follow_from_the_prompts(word_level):
    def answers(prompts):
        return word_level.convert_ids_to_tokens(prompts.answers[:, 0].tolist())

    for prompts, place in ((ioi(word_level, 40), "IO"), (docstring(word_level, 40, templates="all"), "C_def"),
                           (colored_objects(word_level, 40), "color"), (induction(word_level, 40), "B")):  # fmt: skip
        assert answers(prompts) == words_at(word_level, prompts, place)
    prompts = colored_objects(word_level, 90, shots=2)
    assert words_at(word_level, prompts, "asked") == words_at(word_level, prompts, "object")
    assert spread(prompts.variants) == 0
    for text, color in zip(prompts.texts, answers(prompts), strict=True):
        question = text.splitlines()[-2]
        asked = question.rstrip("?").split()[-1]
        assert f"a {color} {asked}" in question
    prompts = subject_verb_agreement(word_level, 2 * 2 * len(AGREEMENT))  # of each template in each number two
    several = {verb.several for verb in VERBS}
    assert spread(prompts.variants) == 0
    assert [verb in several for verb in answers(prompts)] == [v.startswith("several") for v in prompts.variants]


def test_in_the_corrupted_induction_prompt_the_other_token_follows(word_level):
    prompts = induction(word_level, 60, templates="all")
    for i, ids in enumerate(prompts.corrupted_ids):
        end, at = int(prompts.positions["END"][i]), int(prompts.positions["D"][i])
        assert ids[at - 1] == ids[end]
        assert ids[at] == prompts.wrong[i, 0]
        assert (ids[:end] == ids[end]).sum() == 1


@pytest.mark.parametrize(("start", "end"), [("<s>", "</s>"), (None, "</s>"), (None, None)])
def test_prompts_begin_as_the_tokenizer_says_and_never_end_with_a_special_token(tokenizer_of, all_words, start, end):
    tokenizer = tokenizer_of(all_words, start, end)
    prompts = ioi(tokenizer, 10)
    assert (prompts.input_ids[:, 0] == tokenizer.bos_token_id).all() == (start is not None)
    assert set(words_at(tokenizer, prompts, "END")) == {"to"}
    with_start, without = ioi(tokenizer, 10, bos=True), ioi(tokenizer, 10, bos=False)
    assert torch.equal(with_start.input_ids[:, 1:], without.input_ids)
    assert torch.equal(with_start.positions["S2"], without.positions["S2"] + 1)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (ioi, r"writes \d+ of the \d+ names as one token, and IOI needs 5"),
        (greater_than, r"writes \d+ of the 100 years .* greater-than needs 100 and 20"),
        (colored_objects, r"writes \d+ of the \d+ colours as one token, and coloured objects needs 6"),
    ],
)
def test_a_tokenizer_with_too_few_words_says_so_with_numbers(bpe, make, expected):
    with pytest.raises(AttnlabError, match=expected):
        make(bpe, 8)


def test_a_word_that_is_unknown_is_no_single_token(tokenizer_of):
    tokenizer = tokenizer_of([" ".join(NAMES[:3])])
    with pytest.raises(AttnlabError, match=f"writes 3 of the {len(NAMES)} names"):
        ioi(tokenizer, 4)
    with pytest.raises(AttnlabError, match="does not know some word"):
        ioi(tokenizer_of([" ".join(NAMES)]), 4)
    with pytest.raises(AttnlabError, match="expected a tokenizer of transformers"):
        ioi("gpt2", 4)


@pytest.mark.parametrize(
    "arguments",
    [{"n": 0}, {"n": True}, {"words": "test"}, {"templates": "test"}, {"templates": [99]}, {"templates": []}],
)
@pytest.mark.parametrize("name", TASKS)
def test_arguments_that_are_none_are_refused(word_level, name, arguments):
    with pytest.raises(ValueError, match="expected"):
        TASKS[name](word_level, **{"n": 4, **arguments})


@FEW
@given(seed=st.integers(0, 1000), size=st.integers(3, 12), draws=st.integers(1, 200))
def test_a_deck_draws_every_entry_equally_often_where_none_is_ruled_out_twice_running(seed, size, draws):
    import numpy as np

    rng = np.random.default_rng(seed)
    deck, counts = Deck(rng, range(size)), Counter(dict.fromkeys(range(size), 0))
    ruled_out = 0
    for _ in range(draws):
        ruled_out = (ruled_out + int(rng.integers(1, size))) % size
        drawn = deck.draw(but=[ruled_out])
        assert drawn != ruled_out
        counts[drawn] += 1
    assert max(counts.values()) - min(counts.values()) <= 2
