// A line under the pointer, and what the curves show there.

function show(plot, x) {
  const { at, places, values } = known(plot);
  if (!at.length) return;
  const wide = plot.querySelector("svg").viewBox.baseVal.width;
  let best = 0;
  at.forEach((place, i) => { if (Math.abs(place / wide - x) < Math.abs(at[best] / wide - x)) best = i; });
  let cursor = plot.querySelector(".cursor");
  if (!cursor) {
    cursor = document.createElement("div");
    cursor.className = "cursor";
    plot.append(cursor);
  }
  cursor.style.left = `${(100 * at[best]) / wide}%`;
  say(plot, places[best], values[best]);
}

function say(plot, place, texts) {
  const output = plot.closest("figure").querySelector("output");
  output.textContent = `${plot.dataset.along} ${place}: ${texts.map((t) => t || "–").join(", ")}`;
}

function known(plot) {
  return { at: JSON.parse(plot.dataset.at), places: JSON.parse(plot.dataset.places), values: JSON.parse(plot.dataset.values) };
}

export function watchCharts() {
  let last = 0;
  const point = (plot) => {
    const box = plot.getBoundingClientRect();
    show(plot, (last - box.left) / box.width);
  };
  document.addEventListener("pointermove", (event) => {
    const plot = event.target.closest?.(".plot");
    if (!plot) return;
    last = event.clientX;
    point(plot);
  });
  document.addEventListener("drawn", () => {
    const plot = document.querySelector(".plot:hover");
    if (plot) point(plot); // the page that came knows nothing of a pointer that rests there
  });
  document.addEventListener("pointerout", (event) => {
    const plot = event.target.closest?.(".plot");
    if (!plot || plot.contains(event.relatedTarget)) return;
    plot.querySelector(".cursor")?.remove();
    const { places, values } = known(plot);
    if (places.length) say(plot, places.at(-1), values.at(-1));
  });
}
