/** What the administrators' page shows, as elements. All text goes in as text. Knows no HTTP. */

import { element, textButton } from "./dom.js";

/** @typedef {import("./admin-api.js").Gateway} Gateway */
/** @typedef {Node | string} Cell */

/**
 * What the buttons do.
 * @typedef {{tell: (what: "drain" | "resume" | "dismiss", name: string) => void, revive: (id: string) => void}} Actions
 */

const number = new Intl.NumberFormat();

/**
 * Returns a table; the first cell of each row is its head, the last has what can be done.
 * @param {string} label
 * @param {string[]} heads those that begin with # stand over numbers
 * @param {Cell[][]} rows
 * @param {string} nothing what is said where there are none
 * @returns {HTMLElement}
 */
function table(label, heads, rows, nothing) {
  if (rows.length === 0) return element("p", { class: "nothing" }, nothing);
  const names = heads.map((head) => head.replace("#", ""));
  const kind = (/** @type {number} */ place) => (heads[place].startsWith("#") ? "number" : names[place] === "" ? "do" : null);
  const head = names.map((name, place) =>
    element("th", { scope: "col", class: kind(place) }, name || element("span", { class: "visually-hidden" }, "What to do")),
  );
  const body = rows.map((cells) =>
    element(
      "tr",
      {},
      ...cells.map((cell, place) =>
        place === 0
          ? element("th", { scope: "row" }, cell)
          : element("td", { class: kind(place), "data-label": names[place] || null }, cell),
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
function together(...children) {
  const made = document.createDocumentFragment();
  made.append(...children);
  return made;
}

/** @param {string} label @param {string} about whom it concerns, for who cannot see the row @param {() => void} action */
function button(label, about, action) {
  const made = textButton(label, "plain-button", action);
  made.setAttribute("aria-label", `${label} ${about}`);
  return made;
}

/** @param {Gateway} gateway @param {Actions} actions */
export function workers({ workers: here, drained, dismissed }, actions) {
  const rows = here.map((each) => {
    const [text, bad] = each.drained ? ["drained", true] : each.apart ? ["apart", true] : ["working", false];
    const about = Object.entries(each.about).map(([name, value]) => `${name} ${value}`);
    return [
      together(document.createTextNode(each.name), element("span", { class: "about" }, about.join(" · "))),
      element("span", { class: bad ? "badge bad" : "badge" }, text),
      each.models.join(", "),
      `${each.jobs.length} of ${each.slots}`,
      new Date(1000 * each.since).toLocaleString(undefined, { dateStyle: "short", timeStyle: "short" }),
      `${Math.round(each.heard)} s ago`,
      together(
        each.drained
          ? button("Resume", each.name, () => actions.tell("resume", each.name))
          : button("Drain", each.name, () => actions.tell("drain", each.name)),
        button("Dismiss", each.name, () => actions.tell("dismiss", each.name)),
      ),
    ];
  });
  const names = new Set(here.map(({ name }) => name));
  const away = [...new Set([...drained, ...dismissed])].filter((name) => !names.has(name));
  for (const name of away) {
    const state = element("span", { class: "badge bad" }, dismissed.includes(name) ? "dismissed" : "drained, away");
    rows.push([name, state, "", "", "", "", button("Resume", name, () => actions.tell("resume", name))]);
  }
  return table("Workers", ["Worker", "State", "Models", "#Jobs", "Since", "#Heard", ""], rows, "No worker is here.");
}

/** @param {Gateway} gateway */
export function queues({ queues: found }) {
  const rows = found.map((each) => [
    each.model,
    ...[each.queued, each.leased, each.suspects, each.workers, each.slots, each.cost].map((count) => number.format(count)),
  ]);
  const heads = ["Model", "#Queued", "#Running", "#Suspects", "#Workers", "#Slots", "#Tokens queued"];
  return table("Queues", heads, rows, "No model is known yet.");
}

/** @param {Gateway} gateway @param {Actions} actions */
export function dead({ dead: found }, actions) {
  const rows = found.map((each) => [
    each.id,
    each.model,
    each.key || "–",
    each.worker || "–",
    number.format(each.attempts),
    number.format(each.crashes),
    together(button("Revive", each.id, () => actions.revive(each.id))),
  ]);
  const heads = ["Job", "Model", "Key", "Last worker", "#Tries", "#Workers lost", ""];
  return table("Dead letters", heads, rows, "There are none.");
}

/** @param {Gateway} gateway @returns {HTMLElement[]} */
export function figures({ status }) {
  /** @type {[string, string, boolean][]} */
  const shown = [
    ["Requests", number.format(status.running), false],
    ["Queued", number.format(status.queued), false],
    ["Running", `${number.format(status.leased)} / ${number.format(status.slots)}`, false],
    ["Seconds a job", status.seconds.toFixed(status.seconds < 10 ? 1 : 0), false],
    ["Leases lost", number.format(status.lost), status.lost > 0],
    ["Came too late", number.format(status.fenced), false],
    ["Set aside", number.format(status.dead), status.dead > 0],
  ];
  return shown.map(([name, value, bad]) =>
    element("div", { class: bad ? "bad" : null }, element("dt", {}, name), element("dd", {}, value)),
  );
}
