// Shows a page of the console in place of the one that stands there: only what differs is touched.

import { morph } from "./morph.js";
import { serverTime, tell } from "./times.js";

let asked = 0;
let going = 0;

// Draw `url` anew; of answers that overtake each other the last that was asked for counts. With `keep` it is the page
// that stands there, and whoever is on the way to another one comes first.
export async function show(url, { keep = false } = {}) {
  if (keep) return going === 0 && draw(url, keep);
  going += 1;
  try {
    return await draw(url, keep);
  } finally {
    going -= 1;
  }
}

async function draw(url, keep) {
  const mine = ++asked;
  const answer = await fetch(url, { headers: { Accept: "text/html" }, credentials: "same-origin" });
  if (answer.redirected && new URL(answer.url).pathname === "/login") {
    location.assign(`/login?next=${encodeURIComponent(location.pathname + location.search)}`);
    return false;
  }
  if (!answer.ok && answer.status !== 404) throw new Error(`the console answered ${answer.status}`);
  const text = await answer.text();
  if (mine !== asked) return false;
  const page = new DOMParser().parseFromString(text, "text/html");
  const main = page.getElementById("main");
  if (!main) return false;
  if (!keep) document.title = page.title;
  const drawn = page.getElementById("drawn");
  if (drawn) serverTime(Number(drawn.dataset.now));
  tell(page);
  const focused = document.activeElement;
  for (const id of ["main", "nav", "drawn"]) {
    const now = document.getElementById(id);
    const then = page.getElementById(id);
    if (now && then) morph(now, then);
  }
  if (focused?.isConnected && document.activeElement !== focused) focused.focus({ preventScroll: true });
  document.dispatchEvent(new Event("drawn"));
  return true;
}

export async function go(url, { replace = false } = {}) {
  try {
    if (!(await show(url))) return;
    history[replace ? "replaceState" : "pushState"](null, "", url);
    document.dispatchEvent(new Event("shown"));
  } catch {
    location.assign(url);
  }
}

function filterUrl(form) {
  const url = new URL(form.getAttribute("action"), location.href);
  for (const [name, value] of new FormData(form)) if (value) url.searchParams.set(name, value);
  return url.pathname + url.search;
}

export function watchLinks() {
  let waiting = 0;
  document.addEventListener("click", (event) => {
    const link = event.target.closest("a[data-swap]");
    if (!link || event.metaKey || event.ctrlKey || event.shiftKey || event.altKey || event.button) return;
    event.preventDefault();
    go(link.getAttribute("href"));
  });
  document.addEventListener("input", (event) => {
    const form = event.target.closest("form[data-filter]");
    if (!form) return;
    clearTimeout(waiting);
    const pause = event.target.type === "search" ? 120 : 0;
    waiting = setTimeout(() => go(filterUrl(form), { replace: true }), pause);
  });
  document.addEventListener("submit", (event) => {
    if (!event.target.matches("form[data-filter]")) return;
    event.preventDefault();
    clearTimeout(waiting);
    go(filterUrl(event.target), { replace: true });
  });
  addEventListener("popstate", () => {
    document.activeElement?.blur();
    show(location.href).catch(() => location.reload());
  });
}
