// Orders: each is confirmed in a dialog, sent with the session's token, and its outcome said.

const LONGEST_MS = 20000;

function say(text, bad = false) {
  const said = document.getElementById("said");
  const note = document.createElement("div");
  note.className = bad ? "bad" : "";
  const words = document.createElement("p");
  words.textContent = text;
  const away = document.createElement("button");
  away.type = "button";
  away.className = "quiet small";
  away.textContent = "Close";
  away.addEventListener("click", () => note.remove());
  note.append(words, away);
  said.append(note);
  while (said.children.length > 3) said.firstElementChild.remove();
  if (!bad) setTimeout(() => note.remove(), 12000);
}

function why(body, status) {
  return body.error ?? `the console answered ${status}`;
}

async function send(order) {
  const headers = { "Content-Type": "application/json", "X-CSRF-Token": document.getElementById("confirm").dataset.csrf };
  const answer = await fetch("/api/v1/orders", { method: "POST", headers, body: JSON.stringify(order) });
  const body = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error(why(body, answer.status));
  return body.order;
}

async function outcome(number) {
  const end = performance.now() + LONGEST_MS;
  for (let pause = 60; performance.now() < end; pause = Math.min(1.6 * pause, 1500)) {
    await new Promise((done) => setTimeout(done, pause));
    const answer = await fetch(`/api/v1/orders/${number}`);
    const body = await answer.json().catch(() => ({}));
    if (!answer.ok) throw new Error(why(body, answer.status));
    if (body.state !== "waiting") return body;
  }
  throw new Error("the server has not answered yet; the audit log will say what came of it");
}

async function give(order, name) {
  try {
    const { ok, text } = await outcome(await send(order));
    say(ok ? `${name}: ${text || "done"}` : `${name} failed: ${text}`, !ok);
  } catch (error) {
    say(`${name}: ${error.message}`, true);
  }
}

function named(button) {
  return (button.getAttribute("aria-label") ?? button.textContent).replace("…", "").trim();
}

function ask(button) {
  const dialog = document.getElementById("confirm");
  const yes = document.getElementById("confirm-yes");
  const given = document.getElementById("confirm-given");
  const wanted = button.dataset.ask;
  const name = named(button);
  document.getElementById("confirm-title").textContent = `${name}?`;
  document.getElementById("confirm-say").textContent = button.dataset.say;
  document.getElementById("confirm-ask").hidden = !wanted;
  dialog.querySelector("#confirm-ask label").textContent = wanted ? `Write ${wanted} to confirm` : "";
  given.value = "";
  yes.textContent = button.textContent.replace("…", "").trim();
  yes.className = button.classList.contains("danger") ? "main danger" : "main";
  yes.disabled = Boolean(wanted);
  given.oninput = () => { yes.disabled = given.value.trim() !== wanted; };
  const order = JSON.parse(button.dataset.order);
  dialog.onclose = () => { if (dialog.returnValue === "yes") give(order, name); };
  dialog.returnValue = "";
  dialog.showModal();
  (wanted ? given : document.getElementById("confirm-no")).focus();
}

function startRollout() {
  const dialog = document.getElementById("start");
  const field = (name) => document.getElementById(`start-${name}`).value.trim();
  const several = (name) => field(name).split(/[,\s%]+/).filter(Boolean);
  dialog.onclose = () => {
    if (dialog.returnValue === "no") return;
    const order = { order: "rollout_start", release: field("release") };
    if (field("groups")) order.groups = several("groups").map((share) => Number(share) / 100);
    if (field("devices")) order.devices = several("devices");
    give(order, `Start of ${order.release}`);
  };
  dialog.returnValue = "no";
  dialog.showModal();
}

export function watchOrders() {
  document.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    if (button.dataset.order) ask(button);
    else if (button.id === "start-open") startRollout();
    else if (button.id === "confirm-no" || button.id === "start-no") button.closest("dialog").close("no");
  });
}
