// Makes one tree like another while it touches as little as it can: focus, selection, scrolling and what is unfolded
// stay, and a screen reader hears only of what changed.

export function morph(now, then) {
  attributes(now, then);
  children(now, then);
  fields(now, then);
}

function attributes(now, then) {
  for (const { name } of [...now.attributes]) {
    if (!then.hasAttribute(name) && !ours(now, name)) now.removeAttribute(name);
  }
  for (const { name, value } of then.attributes) {
    if (now.getAttribute(name) !== value && !ours(now, name)) now.setAttribute(name, value);
  }
}

// A field shows what the page says, unless somebody is in it.
function fields(now, then) {
  if (now.tagName === "PROGRESS") now.value = then.value;
  if (/^(INPUT|SELECT)$/.test(now.tagName) && now !== document.activeElement) now.value = then.value;
}

// What people have done to the page is theirs.
function ours(node, name) {
  return (name === "open" && /^(DETAILS|DIALOG)$/.test(node.tagName)) || (name === "value" && node.tagName === "INPUT");
}

function key(node) {
  return node.nodeType === 1 ? node.dataset.key ?? node.id ?? "" : "";
}

function alike(a, b) {
  return a.nodeType === b.nodeType && a.nodeName === b.nodeName && key(a) === key(b);
}

function children(now, then) {
  if (now.hasAttribute?.("data-keep")) return;
  const known = new Map([...now.children].filter(key).map((child) => [key(child), child]));
  const wanted = new Set([...then.children].map(key).filter(Boolean));
  let at = now.firstChild;
  const drop = () => {
    const next = at.nextSibling;
    at.remove();
    at = next;
  };
  for (const next of [...then.childNodes]) {
    const same = key(next) && known.get(key(next));
    if (same && same.nodeName === next.nodeName) {
      // What is gone goes first, so that what stays need not move: what moves loses the focus.
      while (at && at !== same && !wanted.has(key(at))) drop();
      if (at !== same) now.insertBefore(same, at);
      at = same;
    }
    if (at && alike(at, next)) {
      if (at.nodeType === 1) morph(at, next);
      else if (at.nodeValue !== next.nodeValue) at.nodeValue = next.nodeValue;
      at = at.nextSibling;
    } else {
      now.insertBefore(document.importNode(next, true), at);
    }
  }
  while (at) drop();
}
