"use strict";
// The page's data, and the filter that selects from it. This file draws nothing. answers_page.py describes the columns.
const data = JSON.parse(document.getElementById("data").textContent);
const { questions, answers, verdicts, texts, states } = data;
const SCORE_CHANGE = 0.5; // a score that changes by at least this much counts as changed
const SCORE = states.indexOf("score");
const NONE = states.indexOf("none");
const LABELS = SCORE; // the states before this one are labels
const REPEATABLE = new Set(["label", "case"]); // filters that an address may repeat: an answer matches one of the values
const SETTINGS = { sort: ["changed", "longest"], beside: ["base", "none"] };
const textAt = (index) => (index < 0 ? "" : texts[index]);

// The values of each filter: the words in the address, in the order of the columns' numbers. "case" is the split.
const names = {
  model: data.models.map(textAt),
  judge: data.judges.map(textAt),
  label: states,
  case: distinct(questions.split),
  category: distinct(questions.category),
};
const splitOf = numbered(questions.split, names.case);
const categoryOf = numbered(questions.category, names.category);
const baseOf = findBase();
const disagreements = answers.model.map((_, answer) => judgesDisagree(answer));

function distinct(indices) {
  return [...new Set(indices)].filter((index) => index >= 0).map(textAt);
}

function numbered(indices, values) {
  const numbers = new Map(values.map((value, number) => [value, number]));
  return indices.map((index) => (index < 0 ? -1 : numbers.get(textAt(index))));
}

/** For each answer the first model's answer to the same question and sample, or -1. */
function findBase() {
  const key = (answer) => answers.question[answer] + "/" + answers.sample[answer];
  const baseAnswers = new Map();
  answers.model.forEach((model, answer) => {
    if (model === 0) baseAnswers.set(key(answer), answer);
  });
  return answers.model.map((model, answer) => (model === 0 ? -1 : baseAnswers.get(key(answer)) ?? -1));
}

/** Whether two judges gave an answer different labels, and each of them could have given the other's label. */
function judgesDisagree(answer) {
  const labels = verdicts.map((judge, number) => [judge.state[answer], number]).filter(([state]) => state < LABELS);
  const canGive = (judge, state) => data.labels[judge].includes(state);
  return labels.some(([state, judge]) =>
    labels.some(([otherState, otherJudge]) => state !== otherState && canGive(judge, otherState) && canGive(otherJudge, state)),
  );
}

/** The selected judge, or for -1 the judge behind the rates of the answer's model. */
const judgeOf = (answer, judge) => (judge < 0 ? answers.judge[answer] : judge);

/** The state of an answer by a judge. */
function stateOf(answer, selectedJudge) {
  const judge = judgeOf(answer, selectedJudge);
  return judge < 0 ? (answers.error[answer] < 0 ? NONE : states.indexOf("failed")) : verdicts[judge].state[answer];
}

/** Whether the judge gave the answer another label, or a clearly different score, than the first model's answer. */
function changed(answer, selectedJudge) {
  const base = baseOf[answer];
  const judge = judgeOf(answer, selectedJudge);
  if (base < 0 || judge < 0) return false;
  const { state, score } = verdicts[judge];
  if (state[answer] === SCORE && state[base] === SCORE) return Math.abs(score[answer] - score[base]) >= SCORE_CHANGE;
  return state[answer] < LABELS && state[base] < LABELS && state[answer] !== state[base];
}

let lowerCaseTexts = null;
/** For each text whether it contains the query, ignoring case; null for an empty query. */
function textsWith(query) {
  if (!query) return null;
  lowerCaseTexts ??= texts.map((text) => text.toLowerCase());
  const lowerCaseQuery = query.toLowerCase();
  return lowerCaseTexts.map((text) => text.includes(lowerCaseQuery));
}

/** Reads the filter from an address; `unknown` lists values that do not occur in the data. */
function parseFilter(hash) {
  const parameters = new URLSearchParams(hash.replace(/^#/, ""));
  const filter = { unknown: [] };
  const addUnknown = (name, value) => filter.unknown.push(name + " “" + value.slice(0, 80) + "”");
  for (const [name, options] of Object.entries(names)) {
    const values = parameters.getAll(name).filter((value) => value);
    const indices = values.map((value) => options.indexOf(value));
    indices.forEach((index, number) => index < 0 && addUnknown(name, values[number]));
    filter[name] = REPEATABLE.has(name) ? [...new Set(indices.filter((index) => index >= 0))] : indices[0] ?? -1;
  }
  for (const name of ["changed", "disagree"]) filter[name] = parameters.get(name) === "1";
  for (const name of ["q", "id", "group", "sort", "beside"]) filter[name] = parameters.get(name) ?? "";
  for (const [name, options] of Object.entries(SETTINGS)) {
    if (!filter[name] || options.includes(filter[name])) continue;
    addUnknown(name, filter[name]);
    filter[name] = "";
  }
  filter.page = Math.max(1, parseInt(parameters.get("page"), 10) || 1);
  return filter;
}

/** The selected values of a filter, as indices into its names. */
const selected = (filter, name) => [filter[name]].flat().filter((index) => index >= 0);

/** The address of a filter, without the settings that have their default. */
function filterHash(filter) {
  const parameters = new URLSearchParams();
  for (const [name, options] of Object.entries(names)) for (const index of selected(filter, name)) parameters.append(name, options[index]);
  for (const name of ["changed", "disagree"]) if (filter[name]) parameters.set(name, "1");
  for (const name of ["q", "id", "group", "sort", "beside"]) if (filter[name]) parameters.set(name, filter[name]);
  if (filter.page > 1) parameters.set("page", String(filter.page));
  return "#" + parameters.toString();
}

/** The matching answers, their questions in order, and for each option of each filter the number of answers it would select. */
function select(filter) {
  const withQuery = textsWith(filter.q);
  const inSelection = questions.id.map(
    (id, question) => (!filter.id || textAt(id) === filter.id) && (!filter.group || textAt(questions.group[question]) === filter.group),
  );
  const result = { matches: new Uint8Array(answers.model.length), total: 0, counts: { changed: 0, disagree: 0 } };
  for (const [name, options] of Object.entries(names)) result.counts[name] = options.map(() => 0);
  for (let answer = 0; answer < answers.model.length; answer++) {
    const question = answers.question[answer];
    if (!inSelection[question]) continue;
    if (withQuery && !withQuery[questions.text[question]] && !(answers.text[answer] >= 0 && withQuery[answers.text[answer]])) continue;
    countAnswer(answer, question, filter, result);
  }
  result.questions = ordered(filter, result);
  return result;
}

const MODEL = 1, LABEL = 2, JUDGE = 4, SPLIT = 8, CATEGORY = 16, CHANGED = 32, DISAGREE = 64;

/** Adds one answer to the result: it matches if no filter excludes it, and counts for a filter's options if no other filter does. */
function countAnswer(answer, question, filter, result) {
  const { counts } = result;
  const state = stateOf(answer, filter.judge);
  const isChanged = changed(answer, filter.judge);
  let excluding = 0; // one bit for each filter that excludes the answer; bits, because this runs for every answer
  if (filter.model >= 0 && filter.model !== answers.model[answer]) excluding |= MODEL;
  if (filter.label.length && !filter.label.includes(state)) excluding |= LABEL;
  if (filter.judge >= 0 && state === NONE) excluding |= JUDGE;
  if (filter.case.length && !filter.case.includes(splitOf[question])) excluding |= SPLIT;
  if (filter.category >= 0 && filter.category !== categoryOf[question]) excluding |= CATEGORY;
  if (filter.changed && !isChanged) excluding |= CHANGED;
  if (filter.disagree && !disagreements[answer]) excluding |= DISAGREE;
  const passesAllBut = (filters) => (excluding & ~filters) === 0;
  if (passesAllBut(MODEL)) counts.model[answers.model[answer]]++;
  if (passesAllBut(LABEL)) counts.label[state]++;
  if (passesAllBut(SPLIT)) counts.case[splitOf[question]]++;
  if (categoryOf[question] >= 0 && passesAllBut(CATEGORY)) counts.category[categoryOf[question]]++;
  if (isChanged && passesAllBut(CHANGED)) counts.changed++;
  if (disagreements[answer] && passesAllBut(DISAGREE)) counts.disagree++;
  if (passesAllBut(LABEL | JUDGE | CHANGED)) countJudges(answer, filter, counts.judge);
  if (excluding === 0) {
    result.matches[answer] = 1;
    result.total++;
  }
}

/** Counts an answer for each judge with which it would match. */
function countJudges(answer, filter, counts) {
  for (let judge = 0; judge < verdicts.length; judge++) {
    const state = verdicts[judge].state[answer];
    if (state !== NONE && (!filter.label.length || filter.label.includes(state)) && (!filter.changed || changed(answer, judge))) counts[judge]++;
  }
}

/** The questions that have a match, in the order that the filter selects. */
function ordered(filter, result) {
  const weights = new Map();
  result.matches.forEach((match, answer) => {
    if (!match) return;
    const question = answers.question[answer];
    const length = data.truncated[answers.text[answer]] ?? textAt(answers.text[answer]).length;
    const weight = weights.get(question) ?? 0;
    weights.set(question, filter.sort === "longest" ? Math.max(weight, length) : weight + Number(changed(answer, filter.judge)));
  });
  const matching = [...weights.keys()].sort((a, b) => a - b);
  return filter.sort ? matching.sort((a, b) => weights.get(b) - weights.get(a)) : matching;
}

/** The answers to each question. */
const answersOf = (() => {
  const byQuestion = questions.id.map(() => []);
  answers.question.forEach((question, answer) => byQuestion[question].push(answer));
  return byQuestion;
})();
