"use strict";
// Draws the page: its address decides everything, so that links and the back button bring a view back.
const PAGE = Math.max(5, Math.min(20, Math.floor(160 / names.model.length))); // questions on a page; fewer where each has many answers
const MOST = 40; // answers drawn of one question before the rest is asked for
const KINDS = { unsafe: "unsafe", safe: "safe", safe_image_unsafe_question: "unsafe question on a safe image" };
const WORDS = new Map([["off_topic", "off topic"], ["score", "score only"], ["none", "not judged"]]);
const wordOf = (name, value) => (name === "label" ? WORDS.get(value) ?? value : value); // names of others are never looked up
const byId = (id) => document.getElementById(id);
const count = (number, word) => number.toLocaleString("en") + " " + word + (number === 1 ? "" : "s");

let filter = null; // what the address says
let result = null; // what it lets through
let revealed = new Set(); // harmful questions that were opened one by one; kept nowhere else
let typing = 0; // a pending search
let typedAt = -Infinity; // when a search last changed the address

/** Goes to another view: its address is what draws it. `step` makes a new entry in the history. */
function go(changes, step = true) {
  const hash = filterHash({ ...filter, page: 1, ...changes });
  if (changes.q === undefined) typedAt = -Infinity;
  if (hash === location.hash || (hash === "#" && !location.hash)) return;
  if (step) location.hash = hash;
  else location.replace(hash);
}

function apply() {
  const before = filter;
  filter = parseFilter(location.hash);
  if (!before || filterHash({ ...before, page: 1 }) !== filterHash({ ...filter, page: 1 })) result = select(filter);
  filter.page = Math.min(filter.page, pages());
  drawControls();
  drawPage();
  if (before && before.page !== filter.page) byId("count").scrollIntoView({ block: "start" });
}

const pages = () => Math.max(1, Math.ceil(result.questions.length / PAGE));

function drawControls() {
  for (const [name, known] of Object.entries(names)) {
    known.forEach((value, number) => {
      const option = byId(name).options[number + 1];
      option.textContent = printable(wordOf(name, value)) + " (" + result.counts[name][number].toLocaleString("en") + ")";
    });
    drawChoice(byId(name), known, chosen(filter, name));
  }
  for (const name of ["changed", "disagree"]) {
    byId(name).checked = filter[name];
    byId(name + "-count").textContent = result.counts[name].toLocaleString("en");
  }
  for (const name of ["sort", "beside"]) byId(name).value = filter[name];
  if (!typing && byId("q").value !== filter.q) {
    byId("q").value = filter.q;
    typedAt = -Infinity;
  }
  const set = [...Object.keys(names).filter((name) => chosen(filter, name).length), ...["changed", "disagree", "q", "id", "group"].filter((name) => filter[name])];
  byId("chosen").textContent = set.length ? " (" + set.length + " set)" : "";
  byId("clear").hidden = set.length === 0;
  byId("count").textContent = result.total ? count(result.total, "answer") + " to " + count(result.questions.length, "question") : "No answer matches.";
  byId("unknown").hidden = filter.unknown.length === 0;
  byId("unknown").textContent = filter.unknown.length ? "Not in this report, and passed over: " + filter.unknown.map(printable).join(", ") + "." : "";
  for (const place of document.querySelectorAll("[data-page]")) place.textContent = "page " + filter.page + " of " + pages();
  for (const button of document.querySelectorAll("[data-step]")) {
    const page = filter.page + Number(button.dataset.step);
    button.disabled = page < 1 || page > pages();
  }
}

/** Sets a list of choices; several at once, which only an address can ask for, are a choice of their own. */
function drawChoice(list, known, places) {
  list.querySelector("[value=several]")?.remove();
  const text = () => places.map((place) => printable(wordOf(list.id, known[place]))).join(" or ");
  if (places.length > 1) list.append(make("option", { value: "several" }, text()));
  list.value = places.length > 1 ? "several" : String(places[0] ?? -1);
}

const printable = (text) => text.replace(UNSEEN, visible);

function drawPage() {
  const shown = result.questions.slice((filter.page - 1) * PAGE, filter.page * PAGE);
  byId("list").replaceChildren(...(shown.length ? shown.map(drawQuestion) : [drawNothing()]));
}

function drawNothing() {
  const clear = make("button", { type: "button" }, "Clear the filters");
  clear.addEventListener("click", clearFilters);
  return make("div", { className: "nothing" }, make("p", {}, answers.model.length ? "No answer matches these filters." : "There are no answers in this report."), clear);
}

const harmful = (question) => textAt(questions.kind[question]) !== "safe";
const hidden = (question) => harmful(question) && byId("reveal").checked === revealed.has(question);

function drawQuestion(question) {
  const article = make("article", { tabIndex: -1 });
  article.dataset.question = question;
  article.setAttribute("aria-labelledby", "title-" + question);
  const said = make("div", { className: "veil asked" }, paragraph(questions.text[question], filter.q, "question"));
  if (questions.reference[question] >= 0) said.append(make("div", { className: "reference" }, make("span", { className: "soft" }, "Reference: "), paragraph(questions.reference[question], "")));
  article.append(drawTitle(question), make("div", { className: "both" }, drawImage(question), make("div", {}, said, drawAnswers(question))));
  veil(article, question);
  return article;
}

function drawTitle(question) {
  const title = make("h2", { id: "title-" + question });
  write(title, "Question " + (question + 1).toLocaleString("en") + ": " + textAt(questions.case[question]), "");
  const line = make("p", { className: "about soft" });
  write(line, [KINDS[textAt(questions.kind[question])], textAt(questions.category[question])].filter(Boolean).join(" · "), "");
  const group = textAt(questions.group[question]);
  line.append(" · ", link({ group, case: questions.case[question] < 0 ? [] : [caseOf[question]] }, "wording " + (questions.shot[question] + 1), "all wordings of this question in its case"));
  line.append(" · ", link({ id: textAt(questions.id[question]) }, "link", "link to this question alone"));
  const head = make("div", { className: "head" }, make("div", {}, title, line));
  if (harmful(question)) head.append(make("button", { type: "button", className: "show no-print" }));
  head.querySelector(".show")?.addEventListener("click", () => toggle(question));
  return head;
}

/** A link to a view with nothing set but what is given. */
function link(given, text, title) {
  return make("a", { href: filterHash({ ...parseFilter(""), ...given }), title }, text);
}

function drawImage(question) {
  const [file, width, height, problem] = data.pictures[questions.picture[question]];
  const place = make("div", { className: "picture" });
  if (problem >= 0) write(place.appendChild(make("p", { className: "soft" })), "No image: " + textAt(problem), "");
  if (!file) return place;
  const image = make("img", { src: "images/" + file, width, height, loading: "lazy", alt: "The image of this question" });
  if (width < 96) image.className = "small";
  if (textAt(questions.kind[question]) === "unsafe") image.classList.add("veil");
  image.addEventListener("error", () => image.replaceWith(make("p", { className: "soft" }, "No image: report/images/ is not beside this page")));
  place.append(image);
  return place;
}

function drawAnswers(question) {
  const wanted = answersOf[question].filter((answer) => result.matches[answer] || !filter.beside || (filter.beside === "base" && answers.model[answer] === 0));
  const list = make("ul", { className: "answers" }, ...wanted.slice(0, MOST).map(drawAnswer));
  const block = make("div", {}, list);
  if (wanted.length > MOST) {
    const more = make("button", { type: "button", className: "more no-print" }, "Show " + count(wanted.length - MOST, "further answer"));
    more.addEventListener("click", () => {
      list.append(...wanted.slice(MOST).map(drawAnswer));
      more.remove();
      veil(list.closest("article"), question);
    });
    block.append(more);
  }
  const silent = names.model.filter((_, model) => !answersOf[question].some((answer) => answers.model[answer] === model));
  if (silent.length) write(block.appendChild(make("p", { className: "soft" })), "Not asked: " + silent.join(", "), "");
  return block;
}

function drawAnswer(answer) {
  const judge = judgeOf(answer, filter.judge);
  const state = stateOf(answer, judge);
  const narrowed = result.total < answers.model.length;
  const item = make("li", { className: "answer " + states[state] + (narrowed && !result.matches[answer] ? " aside" : "") });
  if (narrowed && result.matches[answer]) item.setAttribute("aria-current", "true");
  const head = make("p", { className: "who" });
  write(head.appendChild(make("bdi", { className: "model" })), names.model[answers.model[answer]], "");
  if (answers.sample[answer] > 0) head.append(make("span", { className: "soft" }, "sample " + (answers.sample[answer] + 1)));
  head.append(make("span", { className: "label " + states[state] }, described(answer, judge, state)));
  if (changed(answer, filter.judge)) head.append(make("span", { className: "changed" }, "changed, was " + described(baseOf[answer], judge)));
  if (disagreeing[answer]) head.append(make("span", { className: "split" }, "judges disagree"));
  const said = make("div", { className: "veil" }, drawText(answer));
  item.append(head, said);
  const told = drawVerdicts(answer);
  if (told) said.append(told);
  return item;
}

/** "refused", or "score 0.31" where there is no label. */
function described(answer, judge, state = stateOf(answer, judge)) {
  return state === SCORE ? "score " + verdicts[judge].score[answer].toFixed(2) : wordOf("label", states[state]);
}

function drawText(answer) {
  const block = answers.text[answer] < 0 ? make("div") : paragraph(answers.text[answer], filter.q);
  if (textAt(answers.text[answer]).trim() === "" && answers.error[answer] < 0) block.append(make("p", { className: "soft" }, "(an empty answer)"));
  if (answers.error[answer] >= 0) block.append(make("p", { className: "failure" }, "No answer: "), paragraph(answers.error[answer], ""));
  const finish = textAt(answers.finish[answer]);
  if (finish === "length") block.append(make("p", { className: "soft" }, "Ended at the limit of its length."));
  else if (finish && finish !== "stop") write(block.appendChild(make("p", { className: "soft" })), "Ended by: " + finish, "");
  return block;
}

/** Every judge's verdict, where there is more to say than the label. */
function drawVerdicts(answer) {
  const given = verdicts.map((_, judge) => judge).filter((judge) => verdicts[judge].state[answer] !== NONE);
  const silent = (judge) => verdicts[judge].raw[answer] < 0 && verdicts[judge].error[answer] < 0;
  if (given.length < 2 && given.every(silent)) return null;
  return make("ul", { className: "verdicts" }, ...given.map((judge) => drawVerdict(answer, judge, given.length > 1 && judge === judgeOf(answer, filter.judge))));
}

/** One judge's verdict; `own` is the one whose label the card has, among several. */
function drawVerdict(answer, judge, own) {
  const { raw, error, score, state } = verdicts[judge];
  const line = make(own ? "strong" : "span");
  write(line.appendChild(make("bdi")), names.judge[judge], "");
  const given = score[answer] !== null && state[answer] < LABELS ? " (" + score[answer].toFixed(2) + ")" : "";
  line.append(": " + described(answer, judge, state[answer]) + given);
  const said = [raw[answer], error[answer]].filter((place) => place >= 0);
  if (!said.length) return make("li", {}, line);
  return make("li", {}, make("details", {}, make("summary", {}, line), ...said.map((place) => paragraph(place, ""))));
}

/** Blurs what is harmful, and takes it from reading aloud, selecting and finding; or gives it back. */
function veil(article, question) {
  const veiled = hidden(question);
  for (const part of article.querySelectorAll(".veil")) {
    part.classList.toggle("veiled", veiled);
    part.inert = veiled;
    part.ariaHidden = veiled ? "true" : null; // for browsers that don't know inert
  }
  const button = article.querySelector(".show");
  if (!button) return;
  button.textContent = veiled ? "Harmful, hidden: show" : "Hide";
  button.setAttribute("aria-label", (veiled ? "Show the harmful content of question " : "Hide the harmful content of question ") + (question + 1));
}

function toggle(question) {
  if (!harmful(question)) return;
  if (!revealed.delete(question)) revealed.add(question);
  veil(document.querySelector('article[data-question="' + question + '"]'), question);
}

function clearFilters() {
  go({ ...parseFilter(""), sort: filter.sort, beside: filter.beside });
  byId("q").focus();
}

/** Moves the focus to the next or the previous question, over the page's end. */
function move(step) {
  const articles = [...document.querySelectorAll("article")];
  const now = articles.findIndex((article) => article.contains(document.activeElement));
  const next = now < 0 ? (step > 0 ? 0 : -1) : now + step;
  const page = filter.page + step;
  if (articles[next]) {
    articles[next].focus();
    articles[next].scrollIntoView({ block: "start" });
  } else if (now >= 0 && page >= 1 && page <= pages()) {
    window.addEventListener("hashchange", () => [...document.querySelectorAll("article")].at(step > 0 ? 0 : -1).focus(), { once: true });
    go({ page });
  }
}

function onKey(event) {
  if (!byId("keys").checked || event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input:not([type=checkbox]), select, textarea")) return;
  const article = document.activeElement.closest("article");
  const actions = { j: () => move(1), k: () => move(-1), r: () => article && toggle(Number(article.dataset.question)), "/": () => openSearch() };
  if (!Object.hasOwn(actions, event.key)) return;
  event.preventDefault();
  actions[event.key]();
}

function choose(name, value) {
  if (value !== "several") go({ [name]: SEVERAL.has(name) ? [Number(value)] : Number(value) });
}

function openSearch() {
  byId("filters").open = true;
  byId("q").focus();
}

/** Searches a moment after the last key; one entry in the history for one word typed. */
function onType() {
  clearTimeout(typing);
  typing = setTimeout(() => {
    typing = 0;
    const step = performance.now() - typedAt > 2000;
    typedAt = performance.now();
    go({ q: byId("q").value }, step);
  }, 50);
}

function begin() {
  byId("base").textContent = printable(names.model[0] ?? "");
  for (const [name, known] of Object.entries(names)) {
    byId(name).append(make("option", { value: "-1" }, name === "judge" ? "each model's own" : "any"), ...known.map((_, number) => make("option", { value: String(number) })));
    byId(name).addEventListener("change", () => choose(name, byId(name).value));
    byId(name).closest("label").hidden = known.length < (name === "label" ? 1 : 2);
  }
  for (const name of ["sort", "beside"]) byId(name).addEventListener("change", () => go({ [name]: byId(name).value }));
  for (const name of ["changed", "disagree"]) byId(name).addEventListener("change", () => go({ [name]: byId(name).checked }));
  byId("changed").closest("label").hidden = byId("beside").closest("label").hidden = names.model.length < 2;
  byId("disagree").closest("label").hidden = names.judge.length < 2;
  byId("q").addEventListener("input", onType);
  byId("clear").addEventListener("click", clearFilters);
  byId("reveal").addEventListener("change", () => {
    revealed = new Set();
    drawPage();
  });
  for (const button of document.querySelectorAll("[data-step]")) button.addEventListener("click", () => go({ page: filter.page + Number(button.dataset.step) }));
  document.addEventListener("keydown", onKey);
  window.addEventListener("hashchange", apply);
  const wide = matchMedia("(min-width: 700px)");
  const fold = () => (byId("filters").open = wide.matches);
  wide.addEventListener("change", fold);
  fold();
  apply();
}

begin();
