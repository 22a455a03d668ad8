from __future__ import annotations

import json
import re

import pandas as pd
import pytest
import torch
from plotly.offline import get_plotlyjs
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import attnlab
from attnlab.report import write_report
from attnlab.report.tables import number_text, table_html
from attnlab.results import Metric, Result, heads_frame
from attnlab.runs.run import Run

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>"


@pytest.fixture(scope="module")
def model():
    """A model whose every word is hostile."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {HOSTILE: 0, "plain": 1, "&amp;": 2, "'\"": 3, "[UNK]": 4}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ~ ", "removed")
    torch.manual_seed(0)
    hf = GPT2LMHeadModel(GPT2Config(vocab_size=5, n_positions=32, n_embd=16, n_layer=2, n_head=2)).eval()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")
    return attnlab.load_model(hf, tokenizer=wrapped)


@pytest.fixture(scope="module")
def report(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    texts = [" ~ ".join([HOSTILE, "plain", "&amp;", HOSTILE] * 3), " ~ ".join(["plain", "'\""] * 6)]
    return attnlab.analyze(model, texts, out=out, batch_size=2).report_path


def without_plotly(page: str) -> str:
    assert page.count(get_plotlyjs()) == 1
    return page.replace(get_plotlyjs(), "")


def test_the_page_loads_nothing_from_anywhere(report):
    page = without_plotly(report.read_text())
    assert not re.search(r"""(?:src|href|action|data)\s*=\s*["']?\s*(?:https?:)?//""", page)
    assert not re.search(r"url\(|@import|<link|<iframe|<object|<embed", page)
    assert "http://" not in page
    assert "https://" not in page
    assert re.search(r"Content-Security-Policy\" content=\"default-src 'none'", page)


def test_prompts_and_tokens_stay_text(report):
    page = without_plotly(report.read_text())
    assert "<script>alert" not in page
    assert "<img" not in page
    assert "\\u003cscript\\u003ealert" in page


def test_it_tells_what_was_run_and_found(report):
    page = report.read_text()
    for words in (
        "Findings",
        "Layer × head",
        "One head on one text",
        "Entropy",
        "Sinks",
        "float32",
        "peak memory",
        "Sink_1^0.3",
    ):
        assert words in page


def test_it_runs_in_a_browser_without_a_complaint(report, browse):
    dom, console = browse(report)
    assert console == []
    assert dom.count('class="main-svg"') > 4
    assert len(re.findall(r'role="option"', dom)) == 24
    assert not re.search(r"<img[^>]*onerror", dom)
    assert len(re.findall(r'<button type="button" title="L\dH\d"', dom)) == 2 * 4


def test_the_views_of_a_notebook_run_in_a_browser_without_a_complaint(model, browse, tmp_path):
    view = attnlab.view(model, [0, 1, 2, 3])
    page = tmp_path / "page.html"
    page.write_text(
        f"<!doctype html><meta charset=utf-8><body>{view.fragment()}{view.fragment()}{view._repr_html_()}</body>"
    )
    dom, console = browse(page)
    assert console == []
    assert dom.count('role="option"') == 8
    assert dom.count('aria-selected="true"') == 2


def test_a_report_without_a_model_leaves_the_text_out(report, model, tmp_path):
    run = attnlab.load_run(report.parent)
    write_report(run, tmp_path / "again.html", model=None)
    assert "One head on one text" not in (tmp_path / "again.html").read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["again.html"]


def test_results_of_any_analysis_are_shown_with_their_text_escaped(browse, tmp_path):
    heads = heads_frame([(0, 0, "self", HOSTILE, 0.5, 0.1, 2)])
    result = Result("somebody_elses", (HOSTILE,), heads, pd.DataFrame({HOSTILE: [HOSTILE]}), {})
    run = Run({result.analysis: result}, {"data": {}, "backend": HOSTILE}, {"model": HOSTILE, "notes": [HOSTILE]})
    write_report(run, tmp_path / "r.html")
    page = without_plotly((tmp_path / "r.html").read_text())
    assert "<script>alert" not in page
    assert "<img" not in page
    assert "Somebody elses" in page
    dom, console = browse(tmp_path / "r.html")
    assert console == []
    assert not re.search(r"<img[^>]*onerror", dom)


def test_metrics_are_chosen_in_their_order_and_series_by_their_numbers(tmp_path):
    declared = {f"kept_{n}": Metric(f"Kept at {n} %") for n in (5, 10, 2.5, 50)} | {"whole": Metric("All of it")}
    names = ["also_20", "also_3", *declared, "not_declared"]
    heads = heads_frame([(0, 0, "self", name, 0.5, 0.1, 2) for name in names])
    result = Result("study", (), heads, pd.DataFrame(), {}, metrics=declared)
    write_report(Run({"study": result}, {"data": {}}, {}), tmp_path / "r.html")
    pills = re.findall(r'data-show="map-\d+-data"[^>]*>([^<]+)<', (tmp_path / "r.html").read_text())
    assert pills == [
        "All of it", "Not declared", "Kept at 2.5 %", "Kept at 5 %", "Kept at 10 %", "Kept at 50 %", "Also 3",
        "Also 20",
    ]  # fmt: skip


def test_tables_are_cut_escaped_and_keep_exact_values_for_sorting():
    frame = pd.DataFrame({"token": ["<b>"] * 5, "alpha": [0.123456789] * 5, "first": [True, False] * 2 + [True]})
    page = table_html(frame, most=3)
    assert page.count("<tr>") == 4
    assert "&lt;b&gt;" in page
    assert 'data-v="0.123456789">0.1235' in page
    assert "The first 3 of 5 rows." in page
    assert number_text(float("nan")) == "–"


def test_every_figure_of_the_report_is_json_that_a_script_can_read(report):
    page = without_plotly(report.read_text())
    blocks = re.findall(r'<script type="application/json" id="[^"]+">(.*?)</script>', page, re.DOTALL)
    assert len(blocks) > 10
    for block in blocks:
        json.loads(block)


def acted(report, tmp_path, script: str):
    """The report with a script at its end that plays the reader and writes what came of it into the title."""
    page = tmp_path / "acted.html"
    page.write_text(report.read_text().replace("</body>", f"<script>{script}</script></body>"))
    return page


def title_of(dom: str):
    import html

    return json.loads(html.unescape(re.search(r"<title>(.*?)</title>", dom, re.DOTALL)[1]))


def test_choosing_a_head_and_a_token_colours_the_text_by_its_weights(report, model, browse, tmp_path):
    script = """
      const root = document.getElementById("text-0");
      root.querySelector('button[title="L1H0"]').click();
      const all = () => [...root.querySelectorAll("[role=option]")];
      const option = (i) => all()[i];
      option(5).click();
      const read = () => all().map((o) => o.getAttribute("aria-label").split("weight ")[1]);
      const attends = read();
      option(5).dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowLeft" }));
      const chosen = all().findIndex((o) => o.getAttribute("aria-selected") === "true");
      root.querySelectorAll(".av-tabs button")[1].click();
      const name = root.querySelector(".av-name").textContent;
      document.title = JSON.stringify({ attends, chosen, readers: read(), name });
    """
    dom, console = browse(acted(report, tmp_path, script))
    assert console == []
    seen = title_of(dom)
    ids = model.tokenizer(" ~ ".join([HOSTILE, "plain", "&amp;", HOSTILE] * 3))["input_ids"]
    pattern = attnlab.view(model, ids).patterns[1, 0]
    assert seen["name"] == "L1H0"
    assert [float(w) for w in seen["attends"]] == pytest.approx(pattern[5], abs=0.01)
    assert seen["chosen"] == 4
    assert [float(w) for w in seen["readers"]] == pytest.approx(pattern[:, 4], abs=0.01)


def test_tables_sort_and_metrics_change_by_a_click(report, browse, tmp_path):
    script = """
      const table = document.querySelector("#analysis-entropy table");
      const column = [...table.tHead.rows[0].cells].findIndex((c) => c.textContent === "entropy");
      table.tHead.rows[0].cells[column].querySelector("button").click();
      const values = [...table.tBodies[0].rows].map((r) => Number(r.cells[column].dataset.v));
      const pill = [...document.querySelectorAll(".pills button")].find((b) => b.textContent === "Effective keys");
      pill.click();
      const title = document.getElementById("map").layout.title.text;
      document.title = JSON.stringify({ values, title });
    """
    dom, console = browse(acted(report, tmp_path, script))
    assert console == []
    seen = title_of(dom)
    assert seen["values"] == sorted(seen["values"], reverse=True)
    assert seen["title"] == "Effective keys"


def test_white_space_of_tokens_can_be_seen_in_a_table():
    page = table_html(pd.DataFrame({"token": [" the", "\n  ", "plain"]}))
    assert "<td>·the</td>" in page
    assert "<td>⏎··</td>" in page
    assert "<td>plain</td>" in page
