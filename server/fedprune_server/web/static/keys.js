// The keyboard: / to the search, j and k or arrows through rows, [ and ] through pages. Keys without Ctrl or Alt can be
// switched off, for people whose speech or hands would press them unawares.

const KEPT = "fedprune-keys-off";

function rows() {
  return [...document.querySelectorAll("[data-rows] tbody th a")];
}

function step(by) {
  const all = rows();
  if (!all.length) return;
  const at = all.indexOf(document.activeElement?.closest("tr")?.querySelector("th a"));
  const next = at < 0 ? (by > 0 ? 0 : all.length - 1) : Math.min(Math.max(at + by, 0), all.length - 1);
  all[next].focus();
  all[next].closest("tr").scrollIntoView({ block: "nearest" });
}

const ACTIONS = {
  "/": () => document.getElementById("f-q")?.focus(),
  j: () => step(1),
  k: () => step(-1),
  "[": () => document.querySelector("a[rel=prev]")?.click(),
  "]": () => document.querySelector("a[rel=next]")?.click(),
  "?": () => document.getElementById("keys").showModal(),
};

function typing(target) {
  return target.closest?.("input, select, textarea, dialog, [contenteditable]");
}

export function watchKeys() {
  const off = () => localStorage.getItem(KEPT) === "1";
  const dialog = document.getElementById("keys");
  const box = document.getElementById("keys-on");
  box.checked = !off();
  box.addEventListener("change", () => localStorage.setItem(KEPT, box.checked ? "" : "1"));
  document.getElementById("help").addEventListener("click", () => dialog.showModal());
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return;
    const target = event.target;
    if (target.id === "f-q" && (event.key === "Escape" || (event.key === "ArrowDown" && rows().length))) {
      event.preventDefault();
      target.blur();
      if (event.key === "ArrowDown") step(1);
      return;
    }
    if (typing(target)) return;
    const inRow = target.closest?.("[data-rows] tbody tr");
    if (inRow && (event.key === "ArrowDown" || event.key === "ArrowUp")) {
      event.preventDefault();
      step(event.key === "ArrowDown" ? 1 : -1);
    } else if (!off() && ACTIONS[event.key]) {
      event.preventDefault();
      ACTIONS[event.key]();
    }
  });
}
