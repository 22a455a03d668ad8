"use strict";
// One attention view inside the element `id`; its data lie in the JSON element `id`-data. Nothing global but this function.
function attnlabView(id) {
  const root = document.getElementById(id);
  const data = JSON.parse(document.getElementById(id + "-data").textContent);
  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const kinds = data.kinds.map((k) => ({
    ...k,
    layers: k.heads.length,
    Q: k.queries.length,
    K: k.keys.length,
    weights: bytes(k.weights),
    largest: new Float32Array(bytes(k.largest).buffer),
    same: k.kind !== "cross",
  }));
  // head === -1 is the mean over the heads of the layer; readers: who attends to the chosen token.
  const state = { kind: 0, layer: 0, head: 0, readers: false, token: 0 };

  const make = (tag, className, parent, text) => {
    const element = document.createElement(tag);
    if (className) element.className = className;
    if (text !== undefined) element.textContent = text;
    if (parent) parent.appendChild(element);
    return element;
  };
  const K = () => kinds[state.kind];
  const headsOf = (k, layer, head) => (head >= 0 ? [head] : Array.from({ length: k.heads[layer] }, (_, h) => h));
  // Weights are bytes on a square-root scale of the row's largest.
  const one = (k, layer, head, q, key) => {
    const row = (layer * k.most + head) * k.Q + q;
    const level = k.weights[row * k.K + key] / 255;
    return level * level * k.largest[row];
  };
  const weight = (k, layer, head, q, key) => {
    const heads = headsOf(k, layer, head);
    return heads.reduce((sum, h) => sum + one(k, layer, h, q, key), 0) / heads.length;
  };
  const line = (k, layer, head) =>
    state.readers
      ? Array.from({ length: k.Q }, (_, q) => weight(k, layer, head, q, state.token))
      : Array.from({ length: k.K }, (_, key) => weight(k, layer, head, state.token, key));
  // Whether any head gives the pair a weight: a causal model's later tokens have none.
  const seen = (k, place) =>
    k.heads.some((n, layer) => (state.readers ? weight(k, layer, -1, place, state.token) : weight(k, layer, -1, state.token, place)) > 0);
  const digits = (w) => (w >= 0.0995 ? w.toFixed(2) : w >= 0.00095 ? w.toFixed(3) : w > 0 ? "<0.001" : "0");
  const headName = () => "L" + state.layer + (state.head < 0 ? " mean" : "H" + state.head);
  const label = (text, place) => "“" + text + "” (" + place + ")";

  const top = make("div", "av-top", root);
  const name = make("span", "av-name", top);
  const tabs = (labels, pick) => {
    const group = make("div", "av-tabs", top);
    group.setAttribute("role", "group");
    return labels.map((text, i) => {
      const button = make("button", "", group, text);
      button.type = "button";
      button.addEventListener("click", () => pick(i));
      return button;
    });
  };
  const kindTabs =
    kinds.length > 1
      ? tabs(kinds.map((k) => k.label), (i) => { state.kind = i; build(); })
      : [];
  const wayTabs = tabs(["what this token attends to", "who attends to this token"], (i) => {
    state.readers = i === 1;
    if (!K().same) state.token = chosenSide().length - 1;
    draw();
  });
  const main = make("div", "av-main", root);
  const side = make("div", "av-side", main);
  make("p", "av-cap", side, "layer × head: the stronger the colour, the larger the head’s largest weight here");
  const grid = make("div", "av-grid", side);
  const body = make("div", "", main);
  const panels = make("div", "", body);
  const read = make("div", "av-read", body);
  read.setAttribute("role", "status");
  const best = make("ol", "av-best", body);
  if (data.note) make("p", "av-note", root, data.note);
  make("p", "av-note", root, "Click a token or move with the arrow keys; point at another for its weight. Colours are scaled to the largest weight shown.");

  let cells = [];
  let spans = { queries: [], keys: [] };
  const chosenSide = () => (K().same ? spans.queries : state.readers ? spans.keys : spans.queries);
  const shadedSide = () => (K().same ? spans.queries : state.readers ? spans.queries : spans.keys);

  function buildGrid() {
    const k = K();
    const columns = k.most + 2;
    const cell = k.most > 24 ? 9 : k.most > 14 ? 13 : 17;
    grid.replaceChildren();
    grid.style.setProperty("--av-cell", cell + "px");
    grid.style.gridTemplateColumns = "auto repeat(" + (columns - 1) + ", auto)";
    grid.setAttribute("role", "group");
    grid.setAttribute("aria-label", "head");
    make("b", "", grid, "");
    for (let h = 0; h < k.most; h++) make("b", "av-col", grid, k.most <= 12 || h % 4 === 0 ? String(h) : "");
    make("b", "av-col", grid, "mean");
    cells = [];
    for (let layer = 0; layer < k.layers; layer++) {
      make("b", "", grid, "L" + layer);
      for (let h = 0; h <= k.most; h++) {
        const head = h === k.most ? -1 : h;
        if (head >= k.heads[layer]) { make("span", "", grid); continue; }
        const button = make("button", head < 0 ? "av-mean" : "", grid);
        button.type = "button";
        button.title = head < 0 ? "mean of the heads of layer " + layer : "L" + layer + "H" + head;
        button.setAttribute("aria-label", button.title);
        button.tabIndex = -1;
        const cellOf = { button, layer, head, column: h };
        button.addEventListener("click", () => { state.layer = layer; state.head = head; draw(); });
        button.addEventListener("keydown", (event) => moveInGrid(event, cellOf));
        cells.push(cellOf);
      }
    }
  }
  function moveInGrid(event, from) {
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (!step) return;
    event.preventDefault();
    const to = cells.find((c) => c.layer === from.layer + step[0] && c.column === from.column + step[1]);
    if (!to) return;
    state.layer = to.layer;
    state.head = to.head;
    draw();
    to.button.focus();
  }
  function buildText(title, labels, which) {
    if (title) make("p", "av-cap", panels, title);
    const text = make("div", "av-text", panels);
    text.setAttribute("role", "listbox");
    if (labels.every((shown) => /^#?\d+$/.test(shown))) text.classList.add("av-ids");
    text.setAttribute("aria-label", title || "tokens");
    return labels.map((shown, place) => {
      const span = make("span", "", text);
      const faint = shown.match(/^(·*)([^]*?)(·*)$/);
      for (const [part, soft] of [[faint[1], true], [faint[2], false], [faint[3], true]])
        if (part) make(soft ? "i" : "bdi", "", span, part);
      span.setAttribute("role", "option");
      span.addEventListener("click", () => choose(which, place));
      span.addEventListener("mouseenter", () => tell(which, place));
      span.addEventListener("mouseleave", () => tell());
      span.addEventListener("focus", () => tell(which, place));
      span.addEventListener("keydown", (event) => moveInText(event, which, place));
      if (/⏎/.test(shown)) make("br", "", text);
      return span;
    });
  }
  function choose(which, place) {
    if (!K().same) state.readers = which === "keys";
    state.token = place;
    draw();
    tell();
  }
  function moveInText(event, which, place) {
    const all = spans[which];
    const to = { ArrowLeft: place - 1, ArrowRight: place + 1, ArrowUp: place - 1, ArrowDown: place + 1, Home: 0, End: all.length - 1 }[event.key];
    if (to === undefined && event.key !== "Enter" && event.key !== " ") return;
    event.preventDefault();
    const next = Math.max(0, Math.min(all.length - 1, to === undefined ? place : to));
    choose(which, next);
    all[next].focus();
  }
  function tell(which, place) {
    const k = K();
    read.replaceChildren();
    const chosen = chosenLabels()[state.token];
    const shadedName = state.readers ? "queries" : "keys";
    if (which === undefined || (!k.same && which !== shadedName)) {
      const w = line(k, state.layer, state.head);
      const total = w.reduce((a, b) => a + b, 0);
      make("b", "", read, label(chosen, state.token));
      read.append(state.readers ? " receives most from (" + total.toFixed(2) + " in all)" : " attends most to" + (Math.abs(total - 1) < 0.03 ? "" : " (all weights add up to " + total.toFixed(2) + ")"));
      return;
    }
    const [q, key] = state.readers ? [place, state.token] : [state.token, place];
    read.append(label(k.queries[q], q) + " attends to " + label(k.keys[key], key) + ": ");
    make("b", "", read, digits(weight(k, state.layer, state.head, q, key)));
  }
  const chosenLabels = () => (state.readers ? K().keys : K().queries);
  const shadedLabels = () => (state.readers ? K().queries : K().keys);

  function draw() {
    const k = K();
    name.textContent = headName();
    kindTabs.forEach((b, i) => b.setAttribute("aria-pressed", String(i === state.kind)));
    wayTabs.forEach((b, i) => b.setAttribute("aria-pressed", String((i === 1) === state.readers)));
    const peaks = cells.map((c) => Math.max(...line(k, c.layer, c.head)));
    const peak = Math.max(...peaks, 1e-9);
    cells.forEach((c, i) => {
      const chosen = c.layer === state.layer && c.head === state.head;
      c.button.style.setProperty("--w", (peaks[i] / peak).toFixed(3));
      c.button.setAttribute("aria-pressed", String(chosen));
      c.button.tabIndex = chosen ? 0 : -1;
    });
    const w = line(k, state.layer, state.head);
    const most = Math.max(...w, 1e-9);
    for (const which of ["queries", "keys"]) {
      spans[which].forEach((span, place) => {
        const shaded = spans[which] === shadedSide();
        const chosen = spans[which] === chosenSide() && place === state.token;
        span.style.setProperty("--w", shaded ? (w[place] / most).toFixed(3) : "0");
        span.classList.toggle("av-off", shaded && !chosen && !seen(k, place));
        span.setAttribute("aria-selected", String(chosen));
        span.tabIndex = chosen || (spans[which] !== chosenSide() && place === 0) ? 0 : -1;
        span.setAttribute("aria-label", span.textContent + ", token " + place + (shaded ? ", weight " + digits(w[place]) : ""));
      });
    }
    best.replaceChildren();
    const order = w.map((value, place) => [value, place]).filter(([value]) => value > 0).sort((a, b) => b[0] - a[0]).slice(0, 8);
    for (const [value, place] of order) {
      const item = make("li", "", best);
      const code = make("code", "", item, shadedLabels()[place]);
      make("small", "", code, "  " + place);
      make("em", "", item).style.setProperty("--w", (value / most).toFixed(3));
      make("output", "", item, digits(value));
    }
    tell();
  }
  function build() {
    const k = K();
    state.layer = Math.min(state.layer, k.layers - 1);
    if (state.head >= k.heads[state.layer]) state.head = 0;
    buildGrid();
    panels.replaceChildren();
    if (k.same) {
      spans.queries = spans.keys = buildText("", k.queries, "queries");
    } else {
      spans = { queries: buildText("the decoder's tokens read", k.queries, "queries"), keys: buildText("the encoder's tokens", k.keys, "keys") };
    }
    state.token = chosenSide().length - 1;
    draw();
  }
  // Shown first: a token of the later half that attends far back, past the first token, and the head that does it.
  // Weights beside the diagonal score nothing, sharp ones far away most.
  function firstLook() {
    const k = kinds[0];
    let most = 0;
    for (let layer = 0; layer < k.layers; layer++)
      for (let head = 0; head < k.heads[layer]; head++)
        for (let q = k.Q >> 1; q < k.Q; q++)
          for (let key = 1; key < k.K; key++) {
            const reach = k.same ? Math.log(Math.abs(q - key) || 1) : 1;
            const score = one(k, layer, head, q, key) ** 2 * reach;
            if (score > most) {
              most = score;
              Object.assign(state, { layer, head, token: q });
            }
          }
  }
  build();
  firstLook();
  draw();
}
