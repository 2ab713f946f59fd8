/** Creates the tables and figures of the admin page. All data is inserted as text, never as HTML. */

import { element, textButton } from "./dom.js";

/** @typedef {import("./admin-api.js").Gateway} Gateway @typedef {import("./admin-api.js").ModelServer} ModelServer */
/** @typedef {Node | string} Cell */

/**
 * @typedef {{controlWorker: (action: "drain" | "resume" | "ban", name: string) => void,
 *   reviveJob: (id: string) => void,
 *   controlModel: (action: "load" | "unload" | "unload?force=true", name: string) => void}} Actions actions of the buttons
 */

const number = new Intl.NumberFormat();

/**
 * Returns a table. The first cell of each row is its header; the last has the buttons.
 * @param {string} label
 * @param {string[]} heads column headers; a leading # marks a column of numbers
 * @param {Cell[][]} rows
 * @param {string} placeholder text for an empty table
 * @returns {HTMLElement}
 */
function table(label, heads, rows, placeholder) {
  if (rows.length === 0) return element("p", { class: "nothing" }, placeholder);
  const names = heads.map((head) => head.replace("#", ""));
  const kind = (/** @type {number} */ column) =>
    heads[column].startsWith("#") ? "number" : names[column] === "" ? "do" : null;
  const head = names.map((name, column) =>
    element("th", { scope: "col", class: kind(column) }, name || element("span", { class: "visually-hidden" }, "Actions")),
  );
  const body = rows.map((cells) =>
    element(
      "tr",
      {},
      ...cells.map((cell, column) =>
        column === 0
          ? element("th", { scope: "row" }, cell)
          : element("td", { class: kind(column), "data-label": names[column] || null }, cell),
      ),
    ),
  );
  return element(
    "table",
    { class: "admin-table", "aria-label": label },
    element("thead", {}, element("tr", {}, ...head)),
    element("tbody", {}, ...body),
  );
}

/** @param {...Node} children @returns {DocumentFragment} */
function fragment(...children) {
  const node = document.createDocumentFragment();
  node.append(...children);
  return node;
}

/** @param {string} label @param {string} target named in the accessible label @param {() => void} action */
function button(label, target, action) {
  const node = textButton(label, "plain-button", action);
  node.setAttribute("aria-label", `${label} ${target}`);
  return node;
}

/** @param {Gateway} gateway @param {Actions} actions */
export function workersTable({ workers, drained, banned }, actions) {
  const rows = workers.map((worker) => {
    const [text, bad] = worker.drained ? ["drained", true] : worker.quarantined ? ["quarantined", true] : ["working", false];
    const about = Object.entries(worker.about).map(([name, value]) => `${name} ${value}`);
    return [
      fragment(document.createTextNode(worker.name), element("span", { class: "about" }, about.join(" · "))),
      element("span", { class: bad ? "badge bad" : "badge" }, text),
      worker.models.join(", "),
      `${worker.jobs.length} of ${worker.slots}`,
      new Date(1000 * worker.since).toLocaleString(undefined, { dateStyle: "short", timeStyle: "short" }),
      `${Math.round(worker.heard)} s ago`,
      fragment(
        worker.drained
          ? button("Resume", worker.name, () => actions.controlWorker("resume", worker.name))
          : button("Drain", worker.name, () => actions.controlWorker("drain", worker.name)),
        button("Ban", worker.name, () => actions.controlWorker("ban", worker.name)),
      ),
    ];
  });
  const names = new Set(workers.map(({ name }) => name));
  const away = [...new Set([...drained, ...banned])].filter((name) => !names.has(name));
  for (const name of away) {
    const state = element("span", { class: "badge bad" }, banned.includes(name) ? "banned" : "drained, away");
    rows.push([name, state, "", "", "", "", button("Resume", name, () => actions.controlWorker("resume", name))]);
  }
  return table("Workers", ["Worker", "State", "Models", "#Jobs", "Since", "#Heard", ""], rows, "No workers are connected.");
}

/** @param {Gateway} gateway */
export function queuesTable({ queues }) {
  const rows = queues.map((queue) => [
    queue.model,
    ...[queue.queued, queue.leased, queue.suspects, queue.workers, queue.slots, queue.cost].map((count) => number.format(count)),
  ]);
  const heads = ["Model", "#Queued", "#Running", "#Suspects", "#Workers", "#Slots", "#Tokens queued"];
  return table("Queues", heads, rows, "No models are known yet.");
}

/** @param {Gateway} gateway @param {Actions} actions */
export function deadLettersTable({ dead }, actions) {
  const rows = dead.map((job) => [
    job.id,
    job.model,
    job.key || "–",
    job.worker || "–",
    number.format(job.attempts),
    number.format(job.crashes),
    fragment(button("Revive", job.id, () => actions.reviveJob(job.id))),
  ]);
  const heads = ["Job", "Model", "Key", "Last worker", "#Tries", "#Workers lost", ""];
  return table("Dead letters", heads, rows, "There are no dead letters.");
}

/** @param {number} bytes */
const gigabytes = (bytes) => `${(bytes / 1e9).toFixed(2)} GB`;

/** @param {ModelServer} server @param {Actions} actions */
export function modelsTable({ models }, actions) {
  const rows = models.map((model) => {
    const { name, state, error } = model;
    const presets = model.presets.length > 0 ? `presets: ${model.presets.join(", ")}` : "";
    const about = [error, presets].filter((text) => text).join(" · ");
    const buttons = {
      loaded: [button("Unload", name, () => actions.controlModel("unload", name))],
      unloading: [button("Unload now", name, () => actions.controlModel("unload?force=true", name))],
      loading: [],
    }[state] ?? [button("Load", name, () => actions.controlModel("load", name))];
    return [
      fragment(document.createTextNode(name), element("span", { class: "about" }, about)),
      element("span", { class: state === "failed" ? "badge bad" : "badge" }, model.pinned ? `${state}, pinned` : state),
      model.bytes === null ? "–" : gigabytes(model.bytes),
      number.format(model.running + model.waiting),
      model.idle === null ? "–" : `${number.format(Math.round(model.idle))} s`,
      number.format(model.loads),
      model.load_seconds === null ? "–" : model.load_seconds.toFixed(1),
      fragment(...buttons),
    ];
  });
  const heads = ["Model", "State", "#Memory", "#Answers", "#Idle", "#Loads", "#Seconds per load", ""];
  return table("Models", heads, rows, "There are no models.");
}

/** @param {ModelServer} server @returns {HTMLElement[]} */
export function modelFigures({ models, memory }) {
  const used = gigabytes(models.reduce((sum, { reserved }) => sum + reserved, 0));
  const failed = models.filter(({ state }) => state === "failed").length;
  return figureList([
    ["Memory", memory === null ? used : `${used} / ${gigabytes(memory)}`, false],
    ["Loaded", number.format(models.filter(({ state }) => state === "loaded").length), false],
    ["Failed", number.format(failed), failed > 0],
    ["Answers", number.format(models.reduce((sum, { running, waiting }) => sum + running + waiting, 0)), false],
  ]);
}

/** @param {Gateway} gateway @returns {HTMLElement[]} */
export function figures({ status }) {
  return figureList([
    ["Requests", number.format(status.running), false],
    ["Queued", number.format(status.queued), false],
    ["Running", `${number.format(status.leased)} / ${number.format(status.slots)}`, false],
    ["Seconds per job", status.seconds.toFixed(status.seconds < 10 ? 1 : 0), false],
    ["Leases expired", number.format(status.lost), status.lost > 0],
    ["Results fenced", number.format(status.fenced), false],
    ["Dead letters", number.format(status.dead), status.dead > 0],
  ]);
}

/** @param {[string, string, boolean][]} rows label, value, whether it is a warning @returns {HTMLElement[]} */
function figureList(rows) {
  return rows.map(([name, value, bad]) =>
    element("div", { class: bad ? "bad" : null }, element("dt", {}, name), element("dd", {}, value)),
  );
}
