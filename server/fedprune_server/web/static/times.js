// Times as how long ago they are, kept true while the page stands open. The words are those of formatting.py.

const UNITS = [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"]];
let ahead = 0; // the server's clock less this machine's, in seconds

export function serverTime(at) {
  ahead = at - Date.now() / 1000;
}

export function ago(at, now) {
  const gone = now - at;
  const way = Math.abs(gone);
  if (way < 1.5) return "now";
  const [size, name] = UNITS.find(([unit]) => unit === 1 || way >= 1.5 * unit);
  const text = `${Math.round(way / size)} ${name}`;
  return gone > 0 ? `${text} ago` : `in ${text}`;
}

export function tell(root = document) {
  const now = Date.now() / 1000 + ahead;
  for (const time of root.querySelectorAll("time[data-at]")) {
    const text = ago(Number(time.dataset.at), now);
    if (time.textContent !== text) time.textContent = text;
  }
}

export function watchTimes() {
  const drawn = document.getElementById("drawn");
  if (drawn) serverTime(Number(drawn.dataset.now));
  setInterval(() => { if (!document.hidden) tell(); }, 1000);
}
