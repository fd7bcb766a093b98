"use strict";
// Texts of others in the page: always as text, never as markup; what can't be seen is made visible, and long texts open on request.
const LONG = 1200; // characters shown of a longer text
const UNSEEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb]|[\u{e0000}-\u{e007f}]/gu;

/** An element with properties and children; strings become text. */
function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children.filter((child) => child !== null));
  return element;
}

/** "\u202e" as "U+202E", NUL as its symbol. */
function visible(character) {
  const code = character.codePointAt(0);
  return code < 32 ? String.fromCodePoint(0x2400 + code) : "U+" + code.toString(16).toUpperCase().padStart(4, "0");
}

/** Adds a text to an element: unseen characters as marks, what was searched for highlighted. */
function write(element, text, sought) {
  let end = 0;
  for (const match of text.matchAll(UNSEEN)) {
    highlight(element, text.slice(end, match.index), sought);
    element.append(make("span", { className: "unseen", title: "a character that can't be seen" }, visible(match[0])));
    end = match.index + match[0].length;
  }
  highlight(element, text.slice(end), sought);
}

function highlight(element, text, sought) {
  const lower = text.toLowerCase();
  let end = 0;
  if (sought && lower.length === text.length) {
    const wanted = sought.toLowerCase();
    for (let at = lower.indexOf(wanted); at >= 0; at = lower.indexOf(wanted, end)) {
      element.append(text.slice(end, at), make("mark", {}, text.slice(at, at + wanted.length)));
      end = at + wanted.length;
    }
  }
  if (end < text.length) element.append(text.slice(end));
}

/** A paragraph with the text at a place, in its own direction; a long one is cut, with a button that shows all of it. */
function paragraph(place, sought, className = "text") {
  const text = textAt(place);
  const shown = make("p", { className, dir: "auto" });
  const block = make("div", {}, shown);
  const whole = data.cut[place];
  if (text.length <= LONG) {
    write(shown, text, sought);
  } else {
    write(shown, cutAt(text, LONG) + "…", sought);
    const further = sought && text.toLowerCase().indexOf(sought.toLowerCase(), LONG - sought.length) >= 0 ? "; what you search for is further on, too" : "";
    const more = make("button", { type: "button", className: "more no-print" }, "Show all " + text.length.toLocaleString("en") + " characters" + further);
    more.addEventListener("click", () => {
      shown.replaceChildren();
      write(shown, text, sought);
      more.remove();
      shown.tabIndex = -1;
      shown.focus();
    });
    block.append(more);
  }
  if (whole !== undefined) block.append(make("p", { className: "soft" }, "Cut: the whole has " + whole.toLocaleString("en") + " characters and stands in the run's folder."));
  return block;
}

/** The first characters of a text, no pair of surrogates torn apart. */
function cutAt(text, length) {
  const code = text.charCodeAt(length - 1);
  return text.slice(0, code >= 0xd800 && code < 0xdc00 ? length - 1 : length);
}
