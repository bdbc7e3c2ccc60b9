"use strict";
// Text of models, documents and users becomes text nodes and nothing else.
const $ = id => document.getElementById(id);
const make = (tag, name, text) => {
  const node = document.createElement(tag);
  if (name) node.className = name;
  if (text !== undefined) node.textContent = text;
  return node;
};
const store = {get: k => { try { return sessionStorage.getItem(k) || ""; } catch { return ""; } },
  set: (k, v) => { try { sessionStorage.setItem(k, v); } catch { /* the token then lasts as long as the page */ } }};
let token = store.get("token");
const needed = document.documentElement.dataset.token === "needed";
const turns = [];
let running = null;

function fault(text) { $("fault").hidden = !text; $("fault").textContent = text || ""; }
// Asks for a token; a wrong one is not kept, nor sent again.
function forget() {
  token = ""; store.set("token", "");
  document.body.className = "locked"; $("key").hidden = false; $("about").textContent = "asks for a token"; $("token").focus();
}
async function ask(path, options = {}) {
  const mine = token;
  const headers = {...(options.body ? {"Content-Type": "application/json"} : {}), ...(mine ? {Authorization: "Bearer " + mine} : {})};
  const response = await fetch(path, {...options, headers});
  if (response.ok) return response;
  if (response.status === 401) {
    if (mine === token) forget();
    throw new Error(mine ? "This is none of the server's tokens." : "The server asks for a token.");
  }
  const said = await response.json().catch(() => null);
  throw new Error(said?.error?.message || "the server answered " + response.status);
}

async function arms() {
  const list = (await (await ask("/v1/models")).json()).data.filter(model => model.kind !== "embedding");
  const chosen = new Set([...document.querySelectorAll("#arms :checked")].map(box => box.value));
  document.body.className = "";
  $("arms").replaceChildren(...list.map((model, i) => {
    const label = make("label"), box = make("input");
    box.type = "checkbox"; box.value = model.id;
    box.checked = chosen.size ? chosen.has(model.id) : i === 0;
    label.append(box, make("span", "", model.id), make("small", "", model.kind));
    return label;
  }));
}

// One arm's answer, as it comes.
async function answer(model, turn, card, signal) {
  const text = card.querySelector(".text"), meta = card.querySelector(".meta"), began = performance.now();
  const messages = [];
  for (const before of turns) {
    if (before === turn) break;
    if (before.answers[model]) messages.push({role: "user", content: before.question}, {role: "assistant", content: before.answers[model]});
  }
  messages.push({role: "user", content: turn.question});
  let whole = "", id = "", citations = null, first = 0, usage = null;
  const take = event => {
    if (event.error) throw new Error(event.error.message);
    id = event.id || id; usage = event.usage || usage;
    const delta = event.choices?.[0]?.delta;
    if (delta?.content) { first ||= performance.now(); whole += delta.content; text.textContent = whole; }
    if (delta?.citations) citations = delta.citations;
  };
  try {
    const response = await ask("/v1/chat/completions", {method: "POST", signal, body: JSON.stringify({model, messages, stream: true,
      stream_options: {include_usage: true}, max_tokens: Number($("most").value) || 128, temperature: Number($("heat").value) || 0})});
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const {value, done} = await reader.read();
      if (done) break;
      const events = (rest + value).split("\n\n");
      rest = events.pop();
      for (const event of events) if (event.startsWith("data: ") && event !== "data: [DONE]") take(JSON.parse(event.slice(6)));
    }
    turn.answers[model] = whole;
  } catch (error) {
    if (error.name === "AbortError") meta.append(make("span", "", "stopped"));
    else { text.classList.add("bad"); text.textContent = whole + (whole ? "\n" : "") + error.message; }
  }
  card.classList.remove("live");
  for (const cited of citations || []) {
    const box = make("details");
    box.append(make("summary", "", `[${cited.n}] ${cited.path}, ${cited.lines[0] === cited.lines[1] ? `line ${cited.lines[0]}` : `lines ${cited.lines[0]} to ${cited.lines[1]}`}, ${cited.score.toFixed(2)}`), make("blockquote", "", cited.text));
    meta.before(box);
  }
  const seconds = (performance.now() - began) / 1000;
  meta.append(make("span", "", `${seconds.toFixed(2)} s`));
  if (first) meta.append(make("span", "", `first after ${((first - began) / 1000).toFixed(2)} s`));
  if (usage) meta.append(make("span", "", `${usage.prompt_tokens} + ${usage.completion_tokens} tokens`));
  const rates = make("span", "rates");
  if (id && whole) for (const [word, mark, label] of [["up", "+1", "Good answer"], ["down", "−1", "Bad answer"]]) {
    const button = make("button", "", mark);
    button.type = "button"; button.ariaLabel = label; button.ariaPressed = "false";
    button.onclick = () => ask("/v1/feedback", {method: "POST", body: JSON.stringify({id, rating: word})}).then(() => {
      for (const other of meta.querySelectorAll("button")) { other.ariaPressed = String(other === button); other.disabled = true; }
    }, error => fault(error.message));
    rates.append(button);
  }
  meta.append(rates);
}

$("ask").onsubmit = async event => {
  event.preventDefault();
  const question = $("question").value.trim(), models = [...document.querySelectorAll("#arms :checked")].map(box => box.value);
  if (running || !question) return;
  if (!models.length) { fault("Choose who answers."); return; }
  fault("");
  const turn = {question, answers: {}}, box = make("div", "turn"), grid = make("div", "answers");
  turns.push(turn);
  box.append(make("p", "said", question), grid);
  $("talk").append(box);
  $("question").value = "";
  running = new AbortController();
  $("send").disabled = true; $("stop").hidden = false;
  await Promise.all(models.map(model => {
    const card = make("article", "answer live");
    card.append(make("h3", "", model), make("p", "text"), make("p", "meta"));
    grid.append(card);
    return answer(model, turn, card, running.signal);
  }));
  running = null;
  $("send").disabled = false; $("stop").hidden = true;
};
$("question").onkeydown = event => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); $("ask").requestSubmit(); }
};
$("stop").onclick = () => running?.abort();
$("clear").onclick = () => { running?.abort(); turns.length = 0; $("talk").replaceChildren(); };
$("key").onsubmit = event => {
  event.preventDefault();
  const given = $("token").value.trim();
  if (!given) return;
  token = given; store.set("token", token); $("token").value = "";
  $("key").hidden = true; fault("");
  arms().then(look, error => fault(error.message));
};

const series = {}, SVG = "http://www.w3.org/2000/svg";
function chart(name, unit, value, digits) {
  const line = series[name] ||= [];
  line.push(value);
  if (line.length > 90) line.shift();
  let box = document.querySelector(`[data-chart="${name}"]`);
  if (!box) {
    box = make("div", "chart");
    box.dataset.chart = name;
    const svg = document.createElementNS(SVG, "svg");
    svg.setAttribute("viewBox", "0 0 90 36"); svg.setAttribute("preserveAspectRatio", "none"); svg.setAttribute("aria-hidden", "true");
    svg.append(document.createElementNS(SVG, "polyline"));
    box.append(make("b"), make("span", "", name), svg);
    $("charts").append(box);
  }
  const top = Math.max(...line, 1e-9);
  box.querySelector("b").textContent = value.toFixed(digits) + unit;
  box.querySelector("polyline").setAttribute("points", line.map((y, i) => `${i + 90 - line.length},${(34 - 32 * y / top).toFixed(1)}`).join(" "));
}
const figure = (x, scale, digits, unit) => x ? `${(x.value * scale).toFixed(digits)}${unit} (${(x.low * scale).toFixed(digits)} to ${(x.high * scale).toFixed(digits)})` : "–";
function aliases(list) {
  $("aliases").replaceChildren(...list.map(alias => {
    const scroll = make("div", "scroll"), table = make("table"), head = make("tr");
    for (const name of [alias.alias, "weight", "answers", "errors", "seconds", "good ratings"]) head.append(make("th", "", name));
    table.append(head);
    for (const arm of alias.arms) {
      const row = make("tr");
      for (const text of [arm.model + (arm.champion ? " (champion)" : "") + (alias.shadow === arm.model ? " (shadow)" : ""), String(arm.weight),
        String(arm.requests) + (arm.shadow_requests ? ` + ${arm.shadow_requests} shadow` : ""), figure(arm.errors, 100, 1, " %"), figure(arm.seconds, 1, 2, " s"), figure(arm.feedback, 100, 0, " %")]) row.append(make("td", "", text));
      table.append(row);
      if (arm.rolled_back) {
        const why = make("td", "why", `${arm.model} was rolled back on ${new Date(arm.rolled_back.time * 1000).toLocaleString()}: ${arm.rolled_back.reason}`), line = make("tr");
        why.colSpan = 6; line.append(why); table.append(line);
      }
    }
    scroll.append(table);
    return scroll;
  }));
}
let last = null;
async function look() {
  try {
    const now = await (await ask("/v1/status")).json(), at = performance.now();
    $("about").textContent = `${now.model}${now.draining ? ", going down" : ""}${now.capture ? "; questions and answers are recorded" : ""}`;
    const rate = last ? Math.max(0, now.generation_tokens - last.tokens) / ((at - last.at) / 1000) : 0;
    last = {tokens: now.generation_tokens, at};
    chart("new tokens a second", "", rate, 1);
    chart("requests worked on", "", now.running, 0);
    chart("requests waiting", "", now.waiting, 0);
    chart(`of ${now.cache_tokens} cache tokens`, " %", 100 * now.cache_usage, 0);
    aliases(now.aliases);
    const drift = now.drift, found = drift?.found;
    $("drift").textContent = found ? `Questions: ${drift.questions}; distance of their mean from the reference ${found.centroid_distance.toFixed(3)}, p = ${found.p_value.toFixed(3)} for no drift.`
      : drift ? `Questions: ${drift.questions}; each ${drift.every} are compared with the reference.` : "";
  } catch (error) { if (!needed || token) fault(error.message); }
}
if (needed && !token) forget();
else arms().catch(error => fault(error.message));
if (!needed || token) look();
setInterval(() => { if (!document.hidden && (!needed || token)) look(); }, 2000);
