// The page of qdit-serve: asks for streams of the images API and shows them as they come.

import { eventsOf } from "./events.js";
import { psnrOf } from "./psnr.js";

const EVERY_MODEL = "*";
const PREVIEWS = 3;
const MOST_TRIES = 5;
const HEALTH_MILLISECONDS = 5000;

const find = (selector, from = document) => from.querySelector(selector);
const fields = find("#fields");
let models = [];
let limits = { images: 10, steps: 250, guidance: 20, defaultSteps: 20, defaultGuidance: 1.5 };
let key = sessionStorage.getItem("qdit-key") ?? "";

const headers = () => ({ "content-type": "application/json", ...(key && { authorization: `Bearer ${key}` }) });
const say = (text) => { find("#said").textContent = text; };

// --- the form

async function start() {
  await readLimits();
  const answer = await fetch("v1/models", { headers: headers() });
  if (answer.status === 401) return askForKey(key ? "The server refuses this key." : "The server asks for an API key.");
  models = (await answer.json()).data;
  find("#key-field").hidden = true;
  fillModels();
  fillClasses();
  fields.disabled = false;
  find("#class").focus();
}

async function readLimits() {
  const document_ = await (await fetch("openapi.json")).json();
  const body = document_.paths["/v1/images/generations"].post.requestBody.content["application/json"].schema;
  const bounds = (name) => body.properties[name].anyOf.find((kind) => kind.type !== "null");
  limits = {
    images: bounds("n").maximum,
    steps: bounds("num_inference_steps").maximum,
    guidance: bounds("guidance_scale").maximum,
    defaultSteps: body.properties.num_inference_steps.default,
    defaultGuidance: body.properties.guidance_scale.default,
  };
  join("#steps", "#steps-number", limits.defaultSteps, Math.min(limits.steps, 100));
  join("#guidance", "#guidance-number", limits.defaultGuidance, Math.min(limits.guidance, 8));
  find("#steps-number").max = limits.steps;
  find("#guidance-number").max = limits.guidance;
  find("#count").max = limits.images;
  newSeed();
}

function askForKey(why) {
  fields.disabled = false;
  for (const field of fields.querySelectorAll(".field, #make")) field.hidden = field.id !== "key-field";
  find("#key-field label").textContent = why;
  find("#key").focus();
}

function useKey() {
  key = find("#key").value.trim();
  sessionStorage.setItem("qdit-key", key);
  for (const field of fields.querySelectorAll(".field, #make")) field.hidden = false;
  fields.disabled = true;
  begin();
}

function join(rangeId, numberId, value, most) {
  const [range, number] = [find(rangeId), find(numberId)];
  range.max = most;
  range.value = number.value = value;
  range.addEventListener("input", () => { number.value = range.value; });
  number.addEventListener("input", () => { range.value = number.value; });
}

function option(value, text) {
  const made = document.createElement("option");
  made.value = value;
  made.textContent = text;
  return made;
}

function fillModels() {
  const choices = models.map((model) => option(model.id, `${model.id} (${model.precision}, ${model.engine})`));
  if (models.length > 1) choices.unshift(option(EVERY_MODEL, "side by side"));
  find("#model").replaceChildren(...choices);
  find("#scheduler").replaceChildren(
    ...models[0].schedulers.map((name) => option(name, name.replace(/Scheduler$/, ""))),
  );
  find("#scheduler").value = models[0].default_scheduler;
}

function fillClasses() {
  const { classes, class_count: count } = models[0];
  const named = classes.length > 0;
  find("#class").replaceChildren(...classes.map((name, label) => option(String(label), `${name} (${label})`)));
  find("#class").hidden = !named;
  find("#class-number").hidden = named;
  find("#class-number").max = count - 1;
}

function newSeed() {
  find("#seed").value = crypto.getRandomValues(new Uint32Array(1))[0];
}

function settings() {
  const label = find("#class").hidden ? find("#class-number").value : find("#class").value;
  return {
    prompt: label,
    n: Number(find("#count").value),
    num_inference_steps: Number(find("#steps-number").value),
    guidance_scale: Number(find("#guidance-number").value),
    seed: Number(find("#seed").value),
    scheduler: find("#scheduler").value,
  };
}

function useSettings(model, wanted) {
  find("#model").value = model;
  find("#class").value = find("#class-number").value = wanted.prompt;
  find("#count").value = wanted.n;
  find("#steps").value = find("#steps-number").value = wanted.num_inference_steps;
  find("#guidance").value = find("#guidance-number").value = wanted.guidance_scale;
  find("#seed").value = wanted.seed;
  find("#scheduler").value = wanted.scheduler;
  find("#make").focus();
}

// --- a request and its card

function make() {
  const model = find("#model").value;
  const wanted = settings();
  const chosen = model === EVERY_MODEL ? models : models.filter((one) => one.id === model);
  const card = find("#card").content.firstElementChild.cloneNode(true);
  const name = models[0].classes[Number(wanted.prompt)] || `class ${wanted.prompt}`;
  const control = new AbortController();
  find("h2", card).textContent = name;
  find(".settings", card).textContent =
    `${wanted.num_inference_steps} steps · guidance ${wanted.guidance_scale} · seed ${wanted.seed} · ` +
    wanted.scheduler.replace(/Scheduler$/, "");
  find(".again", card).addEventListener("click", () => useSettings(model, wanted));
  find(".cancel", card).addEventListener("click", () => control.abort());
  find("#empty").hidden = true;
  find("#gallery").prepend(card);
  const columns = chosen.map((one) => addColumn(card, one, wanted));
  finish(card, columns, name, Promise.all(columns.map((column) => follow(column, control.signal))));
}

function addColumn(card, model, wanted) {
  const column = find("#column").content.firstElementChild.cloneNode(true);
  find("h3", column).textContent = `${model.id} · ${model.precision}`;
  const images = find(".images", column);
  images.classList.toggle("single", wanted.n === 1);
  images.classList.toggle("pixels", Number.parseInt(model.size, 10) < 200);
  for (let index = 0; index < wanted.n; index += 1) {
    const frame = document.createElement("div");
    frame.className = "empty-frame";
    images.append(frame);
  }
  find(".columns", card).append(column);
  return { column, model, wanted, done: [] };
}

async function finish(card, columns, name, all) {
  const outcomes = await all;
  find(".cancel", card).remove();
  const complete = outcomes.every((outcome) => outcome === "done");
  say(complete ? `${name} is done` : `${name}: ${outcomes.find((outcome) => outcome !== "done")}`);
  if (complete && columns.length > 1) await compare(card, columns);
}

async function compare(card, columns) {
  const [one, other] = columns;
  const figures = await Promise.all(one.done.map((image, index) => psnrOf(image, other.done[index])));
  const line = find(".between", card);
  line.hidden = false;
  line.textContent =
    `PSNR between ${one.model.id} and ${other.model.id}, from the same noise: ` +
    figures.map((figure) => (Number.isFinite(figure) ? `${figure.toFixed(1)} dB` : "equal")).join(", ");
}

/** Runs one request to its end; resolves to 'done' or to what went wrong. */
async function follow(one, signal) {
  const told = find(".told", one.column);
  const started = performance.now();
  try {
    const answer = await askUntilTaken(one, signal);
    for await (const event of eventsOf(answer.body)) {
      if (event.error) throw new Error(event.error.message);
      show(one, event);
    }
    if (one.done.filter(Boolean).length < one.wanted.n) throw new Error("the server closed the stream");
    find("progress", one.column).remove();
    told.textContent = `${((performance.now() - started) / 1000).toFixed(1)} s`;
    return "done";
  } catch (error) {
    const why = signal.aborted ? "cancelled" : error.message;
    find("progress", one.column).remove();
    told.textContent = why;
    told.classList.add("failed");
    return why;
  }
}

/** The answer once the queue takes the request; a full queue is asked again after Retry-After. */
async function askUntilTaken(one, signal) {
  const body = JSON.stringify({ ...one.wanted, model: one.model.id, stream: true, partial_images: PREVIEWS });
  for (let tries = 1; ; tries += 1) {
    const answer = await fetch("v1/images/generations", { method: "POST", headers: headers(), body, signal });
    if (answer.ok) return answer;
    const { error } = await answer.json();
    if (answer.status !== 429 || tries === MOST_TRIES) throw new Error(error.message);
    await countDown(Number(answer.headers.get("retry-after") ?? 1), find(".told", one.column), signal);
  }
}

async function countDown(seconds, told, signal) {
  for (let left = seconds; left > 0; left -= 1) {
    told.textContent = `the queue is full; next try in ${left} s`;
    await new Promise((resolve) => setTimeout(resolve, 1000));
    signal.throwIfAborted();
  }
}

function show(one, event) {
  if (event.type === "image_generation.progress") {
    find("progress", one.column).value = event.step / event.steps;
    const left = event.eta_seconds === null ? "" : `, about ${Math.ceil(event.eta_seconds)} s left`;
    find(".told", one.column).textContent = `step ${event.step} of ${event.steps}${left}`;
  } else if (event.b64_json) {
    showImage(one, event);
  }
}

function showImage(one, event) {
  const finished = event.type === "image_generation.completed";
  const image = new Image();
  image.src = `data:image/${event.output_format};base64,${event.b64_json}`;
  image.alt = `${event.class_name}, ${finished ? "image" : "preview of image"} ${event.index + 1}, ${one.model.id}`;
  image.classList.toggle("preview", !finished);
  const shown = finished ? linked(image, one, event) : image;
  find(".images", one.column).children[event.index].replaceWith(shown);
  if (finished) one.done[event.index] = image;
}

function linked(image, one, event) {
  const link = document.createElement("a");
  link.href = image.src;
  link.download = `${one.model.id}-${event.label}-${event.seed}-${event.index}.${event.output_format}`;
  link.title = "Save this image";
  link.append(image);
  return link;
}

// --- the server's state

async function watchHealth() {
  const shown = find("#health");
  try {
    const { status, models: states } = await (await fetch("health")).json();
    shown.dataset.state = status === "ready" ? "ready" : "down";
    shown.textContent = Object.entries(states).map(([name, state]) => `${name}: ${state}`).join(" · ");
    if (status !== "ready") shown.textContent += " (not taking requests)";
  } catch {
    shown.dataset.state = "down";
    shown.textContent = "the server does not answer";
  }
  setTimeout(watchHealth, HEALTH_MILLISECONDS);
}

function begin() {
  start().catch((error) => { find("#health").textContent = `cannot start: ${error.message}`; });
}

find("#ask").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!find("#key-field").hidden) useKey();
  else make();
});
find("#new-seed").addEventListener("click", newSeed);
find("#use-key").addEventListener("click", useKey);
begin();
watchHealth();
