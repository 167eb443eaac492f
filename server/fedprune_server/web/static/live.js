// Keeps the page true: listens to the server's events, draws what they touch anew, and says when it can't.

import { show } from "./swap.js";

const QUIET_S = 20; // without any event for so long the page asks whether the server is there
const HIDDEN_S = 10; // a page that nobody sees lets its connection go after so long: a browser has only a few of them
const LONGEST_WAIT_S = 30;

let source = null;
let heard = performance.now();
let pause = 1;
let again = 0;
let waiting = 0;
let drawn = 0;
let lostAt = 0;
let losses = 0;
let paused = false; // people may want to read a table that stands still

// Whether one of these topics is what the page shows: `devices:attic` is one device, `devices:*` any of them.
function touches(changed) {
  const topics = (document.getElementById("main").dataset.topics ?? "").split(/\s+/);
  const any = changed.includes("devices:*");
  return topics.some((topic) => changed.includes(topic) || (any && topic.startsWith("devices:")));
}

function refresh(soon = false) {
  if (waiting || paused || document.hidden) return;
  const every = Number(document.getElementById("main").dataset.every) || 1000;
  const rest = soon ? 0 : Math.max(0, drawn + every - performance.now());
  waiting = setTimeout(async () => {
    const before = losses;
    try {
      await show(location.href, { keep: true });
      if (losses === before) found(); // an answer that was on its way says nothing of a connection that is gone since
    } catch {
      lost();
    } finally {
      drawn = performance.now();
      waiting = 0;
    }
  }, rest);
}

function state(name, text) {
  const live = document.getElementById("live");
  if (paused && name === "open") [name, text] = ["off", "paused"];
  live.dataset.state = name;
  if (live.textContent !== text) live.textContent = text;
}

function lost() {
  losses += 1;
  state("lost", "not live");
  const box = document.getElementById("lost");
  if (!lostAt) {
    lostAt = Date.now() / 1000;
    box.replaceChildren(Object.assign(document.createElement("p"), { textContent: "Connection lost. What you see may be out of date; trying again." }));
    box.hidden = false;
  }
}

function found() {
  if (lostAt) {
    const box = document.getElementById("lost");
    box.hidden = true;
    box.replaceChildren();
    lostAt = 0;
    if (source?.readyState === EventSource.OPEN) state("open", "live");
  }
}

function close() {
  source?.close();
  source = null;
  clearTimeout(again);
}

function open() {
  close();
  state(lostAt ? "lost" : "wait", lostAt ? "not live" : "connecting");
  source = new EventSource("/api/v1/events");
  source.addEventListener("hello", () => {
    pause = 1;
    heard = performance.now();
    found();
    state("open", "live");
    refresh(true);
  });
  source.addEventListener("ended", () => location.reload());
  source.addEventListener("changed", (event) => {
    heard = performance.now();
    if (touches(JSON.parse(event.data))) refresh();
  });
  source.addEventListener("error", () => {
    // A browser tries again by itself after some errors and never after others: here it is always done.
    close();
    lost();
    again = setTimeout(open, 1000 * pause);
    pause = Math.min(2 * pause, LONGEST_WAIT_S);
  });
}

function pauseOrGoOn() {
  paused = !paused;
  document.getElementById("live").setAttribute("aria-pressed", String(paused));
  if (source && !lostAt) state("open", "live");
  refresh(true);
}

export function watchServer() {
  let leaving = 0;
  document.getElementById("live").addEventListener("click", pauseOrGoOn);
  document.addEventListener("visibilitychange", () => {
    clearTimeout(leaving);
    if (document.hidden) leaving = setTimeout(close, 1000 * HIDDEN_S);
    else if (!source) open();
    else refresh();
  });
  addEventListener("pagehide", close);
  addEventListener("pageshow", (event) => { if (event.persisted) open(); });
  addEventListener("online", () => { if (lostAt) open(); });
  addEventListener("offline", lost);
  setInterval(() => {
    if (!document.hidden && source && performance.now() - heard > 1000 * QUIET_S) {
      heard = performance.now();
      refresh();
    }
  }, 5000);
  open();
}
