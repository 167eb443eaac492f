// What charts and lists do beyond being read: the values under the pointer, a legend that hides and highlights, search.

const hidden = new Map(); // per group of charts the curves that are switched off

function read(plot) {
  const { along, at, places, values, names, styles } = plot.dataset;
  return { along, ...Object.fromEntries(Object.entries({ at, places, values, names, styles }).map(([k, v]) => [k, JSON.parse(v)])) };
}

// A place on the x axis: "round 3", but "3 MB" and "3 seconds".
function placeOf(data, index) {
  const { along, places } = data;
  return along === "round" ? `${along} ${places[index]}` : `${places[index]} ${along}`;
}

function off(group) {
  const key = group?.id ?? "";
  if (!hidden.has(key)) hidden.set(key, new Set());
  return hidden.get(key);
}

function shown(plot, data) {
  const gone = off(plot.closest("[data-charts]"));
  return data.names.map((name, i) => ({ name, i })).filter(({ i }) => !gone.has(String(i)));
}

function say(plot, data, best) {
  const output = plot.closest("figure").querySelector("output");
  if (!output) return;
  const texts = shown(plot, data).map(({ name, i }) => `${data.names.length > 1 ? `${name} ` : ""}${data.values[best][i] || "–"}`);
  output.textContent = `${placeOf(data, best)}: ${texts.join(", ")}`;
}

function point(plot, x, y) {
  const data = read(plot);
  if (!data.at.length) return;
  const wide = plot.querySelector("svg").viewBox.baseVal.width;
  let best = 0;
  data.at.forEach((place, i) => { if (Math.abs(place / wide - x) < Math.abs(data.at[best] / wide - x)) best = i; });
  let cursor = plot.querySelector(".cursor");
  if (!cursor) {
    cursor = document.createElement("div");
    cursor.className = "cursor";
    plot.append(cursor);
  }
  cursor.style.left = `${(100 * data.at[best]) / wide}%`;
  say(plot, data, best);
  if (!plot.closest("figure").querySelector("output")) tip(plot, data, best, x, y);
}

// Many curves: a box with those that have a value here, the ones nearest to the pointer first.
function tip(plot, data, best, x, y) {
  const box = plot.querySelector(".tip") ?? plot.appendChild(Object.assign(document.createElement("div"), { className: "tip" }));
  const near = (i) => {
    const line = plot.querySelector(`g[data-curve="${i}"]`);
    const spot = [...(line?.querySelectorAll("polyline") ?? [])].flatMap((l) => [...l.points]);
    const at = data.at[best];
    const closest = spot.reduce((a, b) => (!a || Math.abs(b.x - at) < Math.abs(a.x - at) ? b : a), null);
    return closest ? Math.abs(closest.y / plot.querySelector("svg").viewBox.baseVal.height - y) : 2;
  };
  const here = shown(plot, data).filter(({ i }) => data.values[best][i]).map((c) => ({ ...c, far: near(c.i) })).sort((a, b) => a.far - b.far);
  box.replaceChildren(...[
    Object.assign(document.createElement("b"), { textContent: placeOf(data, best) }),
    ...here.slice(0, 8).map(({ name, i }) => Object.assign(document.createElement("span"), { className: `key ${data.styles[i]}`, textContent: `${name} ${data.values[best][i]}` })),
    ...(here.length > 8 ? [Object.assign(document.createElement("i"), { textContent: `and ${here.length - 8} more` })] : []),
  ]);
  box.style.left = x < 0.5 ? "auto" : "0";
  box.style.right = x < 0.5 ? "0" : "auto";
}

function draw(group) {
  const gone = off(group);
  for (const key of group.querySelectorAll("[data-key-of]")) key.setAttribute("aria-pressed", String(!gone.has(key.dataset.keyOf)));
  for (const curve of group.querySelectorAll("[data-curve]")) curve.classList.toggle("gone", gone.has(curve.dataset.curve));
}

function highlight(group, index) {
  for (const curve of group.querySelectorAll("[data-curve]")) curve.classList.toggle("faint", index !== null && curve.dataset.curve !== index);
}

function filter(field) {
  const text = field.value.trim().toLowerCase();
  const list = field.nextElementSibling;
  const entries = list.querySelector("tbody")?.rows ?? list.children;
  for (const entry of entries) entry.hidden = !entry.textContent.toLowerCase().includes(text);
}

export function watchCharts() {
  let last = [0, 0];
  const at = (plot) => {
    const box = plot.getBoundingClientRect();
    point(plot, (last[0] - box.left) / box.width, (last[1] - box.top) / box.height);
  };
  document.addEventListener("pointermove", (event) => {
    const plot = event.target.closest?.(".plot");
    if (!plot) return;
    last = [event.clientX, event.clientY];
    at(plot);
  });
  document.addEventListener("pointerover", (event) => {
    const key = event.target.closest?.("[data-key-of]");
    if (key) highlight(key.closest("[data-charts]"), key.dataset.keyOf);
  });
  document.addEventListener("pointerout", (event) => {
    const key = event.target.closest?.("[data-key-of]");
    if (key) highlight(key.closest("[data-charts]"), null);
    const plot = event.target.closest?.(".plot");
    if (!plot || plot.contains(event.relatedTarget)) return;
    plot.querySelector(".cursor")?.remove();
    plot.querySelector(".tip")?.remove();
    const data = read(plot);
    if (data.places.length) say(plot, data, data.places.length - 1);
  });
  document.addEventListener("click", (event) => {
    const key = event.target.closest?.("[data-key-of]");
    if (!key) return;
    const group = key.closest("[data-charts]");
    const gone = off(group);
    if (!gone.delete(key.dataset.keyOf)) gone.add(key.dataset.keyOf);
    draw(group);
  });
  document.addEventListener("input", (event) => {
    if (event.target.matches?.("[data-search]")) filter(event.target);
  });
  document.addEventListener("drawn", () => { // the page that came knows neither the pointer nor what is switched off
    document.querySelectorAll("[data-charts]").forEach(draw);
    document.querySelectorAll("[data-search]").forEach(filter);
    const plot = document.querySelector(".plot:hover");
    if (plot) at(plot);
  });
}
