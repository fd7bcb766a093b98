"use strict";
// Draws the page. Its address contains the filter, so that links and the back button restore a view.
const PAGE = Math.max(5, Math.min(20, Math.floor(160 / names.model.length))); // questions on a page, fewer for many models
const MAX_ANSWERS = 40; // answers to one question that are drawn before a button asks for more
const KINDS = { unsafe: "unsafe", safe: "safe", safe_image_unsafe_question: "unsafe question on a safe image" };
const LABEL_TITLES = new Map([["off_topic", "off topic"], ["score", "score only"], ["none", "not judged"]]);
const titleOf = (name, value) => (name === "label" ? LABEL_TITLES.get(value) ?? value : value); // only labels have titles
const byId = (id) => document.getElementById(id);
const count = (number, noun) => number.toLocaleString("en") + " " + noun + (number === 1 ? "" : "s");

let filter = null; // the filter of the address
let result = null; // its result
let revealed = new Set(); // harmful questions that the reader revealed one by one; never stored
let typing = 0; // the timer of a pending search
let typedAt = -Infinity; // when a search last changed the address

/** Changes the filter by changing the address. With `step` this adds an entry to the history. */
function go(changes, step = true) {
  const hash = filterHash({ ...filter, page: 1, ...changes });
  if (changes.q === undefined) typedAt = -Infinity;
  if (hash === location.hash || (hash === "#" && !location.hash)) return;
  if (step) location.hash = hash;
  else location.replace(hash);
}

function apply() {
  const previous = filter;
  filter = parseFilter(location.hash);
  if (!previous || filterHash({ ...previous, page: 1 }) !== filterHash({ ...filter, page: 1 })) result = select(filter);
  filter.page = Math.min(filter.page, pages());
  drawControls();
  drawPage();
  if (previous && previous.page !== filter.page) byId("count").scrollIntoView({ block: "start" });
}

const pages = () => Math.max(1, Math.ceil(result.questions.length / PAGE));

function drawControls() {
  for (const [name, options] of Object.entries(names)) {
    options.forEach((value, number) => {
      const option = byId(name).options[number + 1];
      option.textContent = printable(titleOf(name, value)) + " (" + result.counts[name][number].toLocaleString("en") + ")";
    });
    drawSelection(byId(name), options, selected(filter, name));
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
  const active = [...Object.keys(names).filter((name) => selected(filter, name).length), ...["changed", "disagree", "q", "id", "group"].filter((name) => filter[name])];
  byId("active-filters").textContent = active.length ? " (" + active.length + " set)" : "";
  byId("clear").hidden = active.length === 0;
  byId("count").textContent = result.total ? count(result.total, "answer") + " to " + count(result.questions.length, "question") : "No answer matches.";
  byId("unknown").hidden = filter.unknown.length === 0;
  byId("unknown").textContent = filter.unknown.length ? "Ignored, because this report does not contain it: " + filter.unknown.map(printable).join(", ") + "." : "";
  for (const element of document.querySelectorAll("[data-page]")) element.textContent = "page " + filter.page + " of " + pages();
  for (const button of document.querySelectorAll("[data-step]")) {
    const page = filter.page + Number(button.dataset.step);
    button.disabled = page < 1 || page > pages();
  }
}

/** Selects the filter's values in a list. Several values, which only an address can set, get an option of their own. */
function drawSelection(list, options, indices) {
  list.querySelector("[value=several]")?.remove();
  const text = () => indices.map((index) => printable(titleOf(list.id, options[index]))).join(" or ");
  if (indices.length > 1) list.append(make("option", { value: "several" }, text()));
  list.value = indices.length > 1 ? "several" : String(indices[0] ?? -1);
}

const printable = (text) => text.replace(INVISIBLE, visible);

function drawPage() {
  const onPage = result.questions.slice((filter.page - 1) * PAGE, filter.page * PAGE);
  byId("list").replaceChildren(...(onPage.length ? onPage.map(drawQuestion) : [drawNoMatch()]));
}

function drawNoMatch() {
  const clear = make("button", { type: "button" }, "Clear the filters");
  clear.addEventListener("click", clearFilters);
  const text = answers.model.length ? "No answer matches these filters." : "There are no answers in this report.";
  return make("div", { className: "no-match" }, make("p", {}, text), clear);
}

const harmful = (question) => textAt(questions.kind[question]) !== "safe";
const hidden = (question) => harmful(question) && byId("reveal").checked === revealed.has(question);

function drawQuestion(question) {
  const article = make("article", { tabIndex: -1 });
  article.dataset.question = question;
  article.setAttribute("aria-labelledby", "title-" + question);
  const prompt = make("div", { className: "sensitive prompt" }, paragraph(questions.text[question], filter.q, "question"));
  if (questions.reference[question] >= 0) {
    prompt.append(make("div", { className: "reference" }, make("span", { className: "soft" }, "Reference: "), paragraph(questions.reference[question], "")));
  }
  article.append(drawTitle(question), make("div", { className: "columns" }, drawImage(question), make("div", {}, prompt, drawAnswers(question))));
  hideOrReveal(article, question);
  return article;
}

function drawTitle(question) {
  const title = make("h2", { id: "title-" + question });
  write(title, "Question " + (question + 1).toLocaleString("en") + ": " + textAt(questions.split[question]), "");
  const line = make("p", { className: "details soft" });
  write(line, [KINDS[textAt(questions.kind[question])], textAt(questions.category[question])].filter(Boolean).join(" · "), "");
  const group = textAt(questions.group[question]);
  const split = questions.split[question] < 0 ? [] : [splitOf[question]];
  line.append(" · ", link({ group, case: split }, "wording " + (questions.rewrite[question] + 1), "all wordings of this question in its split"));
  line.append(" · ", link({ id: textAt(questions.id[question]) }, "link", "link to this question alone"));
  const head = make("div", { className: "head" }, make("div", {}, title, line));
  if (harmful(question)) head.append(make("button", { type: "button", className: "reveal-button no-print" }));
  head.querySelector(".reveal-button")?.addEventListener("click", () => toggle(question));
  return head;
}

/** A link to a view with only these filters. */
function link(filters, text, title) {
  return make("a", { href: filterHash({ ...parseFilter(""), ...filters }), title }, text);
}

function drawImage(question) {
  const [file, width, height, problem] = data.images[questions.image[question]];
  const container = make("div", { className: "picture" });
  if (problem >= 0) write(container.appendChild(make("p", { className: "soft" })), "No image: " + textAt(problem), "");
  if (!file) return container;
  const image = make("img", { src: "images/" + file, width, height, loading: "lazy", alt: "The image of this question" });
  if (width < 96) image.className = "small";
  if (textAt(questions.kind[question]) === "unsafe") image.classList.add("sensitive");
  image.addEventListener("error", () => image.replaceWith(make("p", { className: "soft" }, "No image: the folder report/images/ is missing")));
  container.append(image);
  return container;
}

function drawAnswers(question) {
  const visibleAnswers = answersOf[question].filter(
    (answer) => result.matches[answer] || !filter.beside || (filter.beside === "base" && answers.model[answer] === 0),
  );
  const list = make("ul", { className: "answers" }, ...visibleAnswers.slice(0, MAX_ANSWERS).map(drawAnswer));
  const block = make("div", {}, list);
  if (visibleAnswers.length > MAX_ANSWERS) {
    const more = make("button", { type: "button", className: "more no-print" }, "Show " + count(visibleAnswers.length - MAX_ANSWERS, "more answer"));
    more.addEventListener("click", () => {
      list.append(...visibleAnswers.slice(MAX_ANSWERS).map(drawAnswer));
      more.remove();
      hideOrReveal(list.closest("article"), question);
    });
    block.append(more);
  }
  const missing = names.model.filter((_, model) => !answersOf[question].some((answer) => answers.model[answer] === model));
  if (missing.length) write(block.appendChild(make("p", { className: "soft" })), "Not asked: " + missing.join(", "), "");
  return block;
}

function drawAnswer(answer) {
  const judge = judgeOf(answer, filter.judge);
  const state = stateOf(answer, judge);
  const filtered = result.total < answers.model.length;
  const item = make("li", { className: "answer " + states[state] + (filtered && !result.matches[answer] ? " context" : "") });
  if (filtered && result.matches[answer]) item.setAttribute("aria-current", "true");
  const head = make("p", { className: "byline" });
  write(head.appendChild(make("bdi", { className: "model" })), names.model[answers.model[answer]], "");
  if (answers.sample[answer] > 0) head.append(make("span", { className: "soft" }, "sample " + (answers.sample[answer] + 1)));
  head.append(make("span", { className: "label " + states[state] }, describeState(answer, judge, state)));
  if (changed(answer, filter.judge)) head.append(make("span", { className: "changed" }, "changed from " + describeState(baseOf[answer], judge)));
  if (disagreements[answer]) head.append(make("span", { className: "disagreement" }, "judges disagree"));
  const content = make("div", { className: "sensitive" }, drawText(answer));
  item.append(head, content);
  const verdictList = drawVerdicts(answer);
  if (verdictList) content.append(verdictList);
  return item;
}

/** "refused", or "score 0.31" if there is no label. */
function describeState(answer, judge, state = stateOf(answer, judge)) {
  return state === SCORE ? "score " + verdicts[judge].score[answer].toFixed(2) : titleOf("label", states[state]);
}

function drawText(answer) {
  const block = answers.text[answer] < 0 ? make("div") : paragraph(answers.text[answer], filter.q);
  if (textAt(answers.text[answer]).trim() === "" && answers.error[answer] < 0) block.append(make("p", { className: "soft" }, "(empty answer)"));
  if (answers.error[answer] >= 0) block.append(make("p", { className: "failure" }, "No answer: "), paragraph(answers.error[answer], ""));
  const finish = textAt(answers.finish[answer]);
  if (finish === "length") block.append(make("p", { className: "soft" }, "Truncated at the maximum number of tokens."));
  else if (finish && finish !== "stop") write(block.appendChild(make("p", { className: "soft" })), "Finish reason: " + finish, "");
  return block;
}

/** The verdicts of all judges, if they contain more than the label that the answer already shows. */
function drawVerdicts(answer) {
  const judges = verdicts.map((_, judge) => judge).filter((judge) => verdicts[judge].state[answer] !== NONE);
  const labelOnly = (judge) => verdicts[judge].raw[answer] < 0 && verdicts[judge].error[answer] < 0;
  if (judges.length < 2 && judges.every(labelOnly)) return null;
  const emphasized = (judge) => judges.length > 1 && judge === judgeOf(answer, filter.judge);
  return make("ul", { className: "verdicts" }, ...judges.map((judge) => drawVerdict(answer, judge, emphasized(judge))));
}

/** One judge's verdict, emphasized if the answer shows its label. */
function drawVerdict(answer, judge, emphasized) {
  const { raw, error, score, state } = verdicts[judge];
  const line = make(emphasized ? "strong" : "span");
  write(line.appendChild(make("bdi")), names.judge[judge], "");
  const scoreText = score[answer] !== null && state[answer] < LABELS ? " (" + score[answer].toFixed(2) + ")" : "";
  line.append(": " + describeState(answer, judge, state[answer]) + scoreText);
  const details = [raw[answer], error[answer]].filter((index) => index >= 0);
  if (!details.length) return make("li", {}, line);
  return make("li", {}, make("details", {}, make("summary", {}, line), ...details.map((index) => paragraph(index, ""))));
}

/** Hides or reveals harmful content. Hidden content is blurred, and screen readers, selection and search skip it. */
function hideOrReveal(article, question) {
  const isHidden = hidden(question);
  for (const element of article.querySelectorAll(".sensitive")) {
    element.classList.toggle("hidden-content", isHidden);
    element.inert = isHidden;
    element.ariaHidden = isHidden ? "true" : null; // for browsers without support for inert
  }
  const button = article.querySelector(".reveal-button");
  if (!button) return;
  button.textContent = isHidden ? "Harmful content: show" : "Hide";
  button.setAttribute("aria-label", (isHidden ? "Show the harmful content of question " : "Hide the harmful content of question ") + (question + 1));
}

function toggle(question) {
  if (!harmful(question)) return;
  if (!revealed.delete(question)) revealed.add(question);
  hideOrReveal(document.querySelector('article[data-question="' + question + '"]'), question);
}

function clearFilters() {
  go({ ...parseFilter(""), sort: filter.sort, beside: filter.beside });
  byId("q").focus();
}

/** Moves the focus to the next or the previous question, also across pages. */
function move(step) {
  const articles = [...document.querySelectorAll("article")];
  const current = articles.findIndex((article) => article.contains(document.activeElement));
  const next = current < 0 ? (step > 0 ? 0 : -1) : current + step;
  const page = filter.page + step;
  if (articles[next]) {
    articles[next].focus();
    articles[next].scrollIntoView({ block: "start" });
  } else if (current >= 0 && page >= 1 && page <= pages()) {
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
  if (value !== "several") go({ [name]: REPEATABLE.has(name) ? [Number(value)] : Number(value) });
}

function openSearch() {
  byId("filters").open = true;
  byId("q").focus();
}

/** Searches shortly after the last key. A query that is typed without a pause is one entry in the history. */
function onType() {
  clearTimeout(typing);
  typing = setTimeout(() => {
    typing = 0;
    const step = performance.now() - typedAt > 2000;
    typedAt = performance.now();
    go({ q: byId("q").value }, step);
  }, 50);
}

function start() {
  byId("base").textContent = printable(names.model[0] ?? "");
  for (const [name, options] of Object.entries(names)) {
    const any = make("option", { value: "-1" }, name === "judge" ? "default of each model" : "any");
    byId(name).append(any, ...options.map((_, number) => make("option", { value: String(number) })));
    byId(name).addEventListener("change", () => choose(name, byId(name).value));
    byId(name).closest("label").hidden = options.length < (name === "label" ? 1 : 2);
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

start();
