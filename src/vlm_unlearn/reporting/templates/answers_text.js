"use strict";
// Shows texts from models, data files and judges: always as text, never as markup. Invisible characters become visible,
// and long texts are expanded on request.
const LONG = 1200; // characters that are shown of a longer text
const INVISIBLE = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb]|[\u{e0000}-\u{e007f}]/gu;

/** Creates an element with properties and children; strings become text. */
function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children.filter((child) => child !== null));
  return element;
}

/** The visible form of a character: "U+202E" for "\u202e", its symbol for NUL. */
function visible(character) {
  const code = character.codePointAt(0);
  return code < 32 ? String.fromCodePoint(0x2400 + code) : "U+" + code.toString(16).toUpperCase().padStart(4, "0");
}

/** Appends a text to an element, with visible forms of invisible characters and the query highlighted. */
function write(element, text, query) {
  let end = 0;
  for (const match of text.matchAll(INVISIBLE)) {
    highlight(element, text.slice(end, match.index), query);
    element.append(make("span", { className: "control-character", title: "an invisible character" }, visible(match[0])));
    end = match.index + match[0].length;
  }
  highlight(element, text.slice(end), query);
}

function highlight(element, text, query) {
  const lowerCaseText = text.toLowerCase();
  let end = 0;
  if (query && lowerCaseText.length === text.length) {
    const lowerCaseQuery = query.toLowerCase();
    for (let at = lowerCaseText.indexOf(lowerCaseQuery); at >= 0; at = lowerCaseText.indexOf(lowerCaseQuery, end)) {
      element.append(text.slice(end, at), make("mark", {}, text.slice(at, at + lowerCaseQuery.length)));
      end = at + lowerCaseQuery.length;
    }
  }
  if (end < text.length) element.append(text.slice(end));
}

/** A paragraph with a text in its own direction. A long text is shortened, with a button that shows all of it. */
function paragraph(index, query, className = "text") {
  const text = textAt(index);
  const content = make("p", { className, dir: "auto" });
  const block = make("div", {}, content);
  if (text.length <= LONG) {
    write(content, text, query);
  } else {
    write(content, cutAt(text, LONG) + "…", query);
    const matchBelow = query && text.toLowerCase().indexOf(query.toLowerCase(), LONG - query.length) >= 0;
    const label = "Show all " + text.length.toLocaleString("en") + " characters" + (matchBelow ? " (contains further matches)" : "");
    const more = make("button", { type: "button", className: "more no-print" }, label);
    more.addEventListener("click", () => {
      content.replaceChildren();
      write(content, text, query);
      more.remove();
      content.tabIndex = -1;
      content.focus();
    });
    block.append(more);
  }
  const length = data.truncated[index];
  if (length !== undefined) {
    block.append(make("p", { className: "soft" }, "Truncated: the run's folder contains the complete text of " + length.toLocaleString("en") + " characters."));
  }
  return block;
}

/** The first characters of a text, without half of a surrogate pair at the end. */
function cutAt(text, length) {
  const code = text.charCodeAt(length - 1);
  return text.slice(0, code >= 0xd800 && code < 0xdc00 ? length - 1 : length);
}
