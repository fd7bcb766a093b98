"use strict";
// What the page knows, and which of it a filter lets through. Draws nothing. The columns are described in answers_page.py.
const data = JSON.parse(document.getElementById("data").textContent);
const { questions, answers, verdicts, texts, states } = data;
const MOVED = 0.5; // a score that changes by this much or more counts as changed
const LABELS = states.indexOf("score"); // states before this one are labels
const SCORE = LABELS;
const NONE = states.indexOf("none");
const SEVERAL = new Set(["label", "case"]); // filters that an address may set several times: whatever is one of them passes
const SETTINGS = { sort: ["changed", "longest"], beside: ["base", "none"] };
const textAt = (place) => (place < 0 ? "" : texts[place]);

// What each filter can be set to: the words in the address, in the order of the columns' numbers.
const names = {
  model: data.models.map(textAt),
  judge: data.judges.map(textAt),
  label: states,
  case: distinct(questions.case),
  category: distinct(questions.category),
};
const caseOf = numbered(questions.case, names.case);
const categoryOf = numbered(questions.category, names.category);
const baseOf = findBase();
const disagreeing = answers.model.map((_, answer) => disagree(answer));

function distinct(places) {
  return [...new Set(places)].filter((place) => place >= 0).map(textAt);
}

function numbered(places, known) {
  const numbers = new Map(known.map((name, number) => [name, number]));
  return places.map((place) => (place < 0 ? -1 : numbers.get(textAt(place))));
}

/** For each answer the first model's answer to the same question and sample, or -1. */
function findBase() {
  const found = new Map();
  answers.model.forEach((model, answer) => {
    if (model === 0) found.set(answers.question[answer] + "/" + answers.sample[answer], answer);
  });
  return answers.model.map((model, answer) => (model === 0 ? -1 : found.get(answers.question[answer] + "/" + answers.sample[answer]) ?? -1));
}

/** Whether two judges gave an answer different labels, and each could have given the other's: who can't tell refusals denies none. */
function disagree(answer) {
  const given = verdicts.map((judge, who) => [judge.state[answer], who]).filter(([state]) => state < LABELS);
  return given.some(([state, who]) => given.some(([other, whose]) => state !== other && data.tells[who].includes(other) && data.tells[whose].includes(state)));
}

/** The judge that was chosen, or of -1 the one that the rates of the answer's model are made of. */
const judgeOf = (answer, chosen) => (chosen < 0 ? answers.judge[answer] : chosen);

/** What an answer is in the eyes of the judge. */
function stateOf(answer, chosen) {
  const who = judgeOf(answer, chosen);
  return who < 0 ? (answers.error[answer] < 0 ? NONE : states.indexOf("failed")) : verdicts[who].state[answer];
}

/** Whether the same judge labels the answer otherwise than the first model's, or scores it far from that. */
function changed(answer, chosen) {
  const base = baseOf[answer];
  const who = judgeOf(answer, chosen);
  if (base < 0 || who < 0) return false;
  const { state, score } = verdicts[who];
  if (state[answer] === SCORE && state[base] === SCORE) return Math.abs(score[answer] - score[base]) >= MOVED;
  return state[answer] < LABELS && state[base] < LABELS && state[answer] !== state[base];
}

let lowered = null;
/** For each text whether it holds what was typed, in whatever case of letters; null where nothing was typed. */
function textsWith(typed) {
  if (!typed) return null;
  lowered ??= texts.map((text) => text.toLowerCase());
  const wanted = typed.toLowerCase();
  return lowered.map((text) => text.includes(wanted));
}

/** Reads the filter out of an address; `unknown` names what is in it and not in the data. */
function parseFilter(hash) {
  const given = new URLSearchParams(hash.replace(/^#/, ""));
  const filter = { unknown: [] };
  for (const [name, known] of Object.entries(names)) {
    const values = given.getAll(name).filter((value) => value);
    const places = values.map((value) => known.indexOf(value));
    places.forEach((place, number) => place < 0 && filter.unknown.push(name + " “" + values[number].slice(0, 80) + "”"));
    filter[name] = SEVERAL.has(name) ? [...new Set(places.filter((place) => place >= 0))] : places[0] ?? -1;
  }
  for (const name of ["changed", "disagree"]) filter[name] = given.get(name) === "1";
  for (const name of ["q", "id", "group", "sort", "beside"]) filter[name] = given.get(name) ?? "";
  for (const [name, known] of Object.entries(SETTINGS)) {
    if (!filter[name] || known.includes(filter[name])) continue;
    filter.unknown.push(name + " “" + filter[name].slice(0, 80) + "”");
    filter[name] = "";
  }
  filter.page = Math.max(1, parseInt(given.get("page"), 10) || 1);
  return filter;
}

/** What a filter is set to: places in its names. */
const chosen = (filter, name) => [filter[name]].flat().filter((place) => place >= 0);

/** The address of a filter: what is not set is not in it. */
function filterHash(filter) {
  const given = new URLSearchParams();
  for (const [name, known] of Object.entries(names)) for (const place of chosen(filter, name)) given.append(name, known[place]);
  for (const name of ["changed", "disagree"]) if (filter[name]) given.set(name, "1");
  for (const name of ["q", "id", "group", "sort", "beside"]) if (filter[name]) given.set(name, filter[name]);
  if (filter.page > 1) given.set("page", String(filter.page));
  return "#" + given.toString();
}

/**
 * The answers that a filter lets through, their questions in order, and for each choice of each filter how many answers there would be.
 */
function select(filter) {
  const found = textsWith(filter.q);
  const rest = questions.id.map((id, question) => (!filter.id || textAt(id) === filter.id) && (!filter.group || textAt(questions.group[question]) === filter.group));
  const result = { matches: new Uint8Array(answers.model.length), total: 0, counts: { changed: 0, disagree: 0 } };
  for (const [name, known] of Object.entries(names)) result.counts[name] = known.map(() => 0);
  for (let answer = 0; answer < answers.model.length; answer++) {
    const question = answers.question[answer];
    if (!rest[question]) continue;
    if (found && !found[questions.text[question]] && !(answers.text[answer] >= 0 && found[answers.text[answer]])) continue;
    weigh(answer, question, filter, result);
  }
  result.questions = ordered(filter, result);
  return result;
}

const MODEL = 1, LABEL = 2, JUDGE = 4, CASE = 8, CATEGORY = 16, CHANGED = 32, DISAGREE = 64;

/** Counts one answer: it matches where no filter stops it, and adds to the choices of a filter that alone stops it. */
function weigh(answer, question, filter, result) {
  const { counts } = result;
  const state = stateOf(answer, filter.judge);
  const moved = changed(answer, filter.judge);
  let stops = 0; // a bit for each filter that the answer doesn't pass; numbers, because this runs for every answer
  if (filter.model >= 0 && filter.model !== answers.model[answer]) stops |= MODEL;
  if (filter.label.length && !filter.label.includes(state)) stops |= LABEL;
  if (filter.judge >= 0 && state === NONE) stops |= JUDGE;
  if (filter.case.length && !filter.case.includes(caseOf[question])) stops |= CASE;
  if (filter.category >= 0 && filter.category !== categoryOf[question]) stops |= CATEGORY;
  if (filter.changed && !moved) stops |= CHANGED;
  if (filter.disagree && !disagreeing[answer]) stops |= DISAGREE;
  const passes = (but) => (stops & ~but) === 0;
  if (passes(MODEL)) counts.model[answers.model[answer]]++;
  if (passes(LABEL)) counts.label[state]++;
  if (passes(CASE)) counts.case[caseOf[question]]++;
  if (categoryOf[question] >= 0 && passes(CATEGORY)) counts.category[categoryOf[question]]++;
  if (moved && passes(CHANGED)) counts.changed++;
  if (disagreeing[answer] && passes(DISAGREE)) counts.disagree++;
  if (passes(LABEL | JUDGE | CHANGED)) countJudges(answer, filter, counts.judge);
  if (stops === 0) {
    result.matches[answer] = 1;
    result.total++;
  }
}

/** Adds an answer to the judges by whose verdicts it would match. */
function countJudges(answer, filter, counts) {
  for (let judge = 0; judge < verdicts.length; judge++) {
    const state = verdicts[judge].state[answer];
    if (state !== NONE && (!filter.label.length || filter.label.includes(state)) && (!filter.changed || changed(answer, judge))) counts[judge]++;
  }
}

/** The questions with a match, in the order that the filter asks for. */
function ordered(filter, result) {
  const weights = new Map();
  result.matches.forEach((match, answer) => {
    if (!match) return;
    const question = answers.question[answer];
    const length = data.cut[answers.text[answer]] ?? textAt(answers.text[answer]).length;
    const before = weights.get(question) ?? 0;
    weights.set(question, filter.sort === "longest" ? Math.max(before, length) : before + Number(changed(answer, filter.judge)));
  });
  const found = [...weights.keys()].sort((one, other) => one - other);
  return filter.sort ? found.sort((one, other) => weights.get(other) - weights.get(one)) : found;
}

/** The answers of each question, by question; they stand together. */
const answersOf = (() => {
  const found = questions.id.map(() => []);
  answers.question.forEach((question, answer) => found[question].push(answer));
  return found;
})();
