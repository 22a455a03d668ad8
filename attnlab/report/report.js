"use strict";
(() => {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const config = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] };
  const read = (id) => JSON.parse(document.getElementById(id).textContent);

  function themed(layout) {
    const ink = dark.matches ? "#c9d1d9" : "#24292f";
    const card = dark.matches ? "#1b222b" : "#ffffff";
    const result = { ...layout, font: { ...layout.font, color: ink }, autosize: true };
    result.hoverlabel = { ...layout.hoverlabel, bgcolor: card, bordercolor: dark.matches ? "#444c56" : "#c5ccd3", font: { color: ink } };
    if (layout.updatemenus)
      result.updatemenus = layout.updatemenus.map((menu) => ({ ...menu, bgcolor: card, font: { ...menu.font, color: dark.matches ? "#8b949e" : ink } }));
    return result;
  }
  const drawn = new Map();
  function draw(place) {
    const figure = read(place.dataset.figure);
    drawn.set(place, figure);
    // Plotly writes into what it is given; each drawing gets its own.
    place.style.minHeight = (figure.layout.height || 420) + "px";
    return Plotly.react(place, figure.data, themed(figure.layout), config);
  }
  const MARGIN = 600;
  const places = [...document.querySelectorAll(".figure")];
  const watch = new IntersectionObserver(
    (entries) => {
      for (const entry of entries)
        if (entry.isIntersecting) {
          watch.unobserve(entry.target);
          draw(entry.target);
        }
    },
    { rootMargin: `${MARGIN}px` },
  );
  // What is in sight is drawn at once; an observer first reports when the browser gets to paint.
  const near = ({ top, bottom }) => top < innerHeight + MARGIN && bottom > -MARGIN;
  places.forEach((place) => (near(place.getBoundingClientRect()) ? draw(place) : watch.observe(place)));
  dark.addEventListener("change", () => [...drawn.keys()].forEach(draw));
  addEventListener("beforeprint", () => places.filter((place) => !drawn.has(place)).forEach(draw));

  const press = (button) => {
    for (const other of button.parentElement.children) other.setAttribute("aria-pressed", String(other === button));
  };
  document.querySelectorAll(".pills[data-for] button").forEach((button) =>
    button.addEventListener("click", () => {
      const place = document.getElementById(button.parentElement.dataset.for);
      place.dataset.figure = button.dataset.show;
      press(button);
      draw(place);
    }),
  );
  document.querySelectorAll(".pills button[data-text]").forEach((button) =>
    button.addEventListener("click", () => {
      press(button);
      document.querySelectorAll("div.text").forEach((text) => (text.hidden = text.dataset.text !== button.dataset.text));
    }),
  );

  document.querySelectorAll("table.sortable").forEach((table) => {
    const body = table.tBodies[0];
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) =>
      head.querySelector("button").addEventListener("click", () => {
        const number = head.classList.contains("number");
        const down = head.getAttribute("aria-sort") ? head.getAttribute("aria-sort") === "ascending" : number;
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const key = (row) => (number ? Number.parseFloat(row.cells[column].dataset.v) : row.cells[column].textContent);
        const rows = [...body.rows].sort((a, b) => {
          const [x, y] = [key(a), key(b)];
          if (number) {
            if (Number.isNaN(x) || Number.isNaN(y)) return Number(Number.isNaN(x)) - Number(Number.isNaN(y));
            return down ? y - x : x - y;
          }
          return down ? y.localeCompare(x) : x.localeCompare(y);
        });
        body.append(...rows);
      }),
    );
  });
})();
