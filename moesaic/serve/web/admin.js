/** The administrators' page: looks at the gateway again and again, and tells it what to do. */

import { controlGateway, controlWorker, fetchGateway, reviveJob } from "./admin-api.js";
import { dead, figures, queues, workers } from "./admin-tables.js";
import { describe } from "./api.js";
import { MoesaicError } from "./client/index.js";
import { byId } from "./dom.js";
import { askKey } from "./key.js";
import { notify } from "./notices.js";
import { ADMIN, readKey } from "./preferences.js";
import { offerThemes } from "./themes.js";

const EVERY = 2000; // ms
const WORDS = { serving: "takes requests", draining: "draining: takes nothing new", stopping: "about to stop" };

/** @type {number | undefined} */
let next;
let looking = false;
/** @type {string} as it was shown last */
let state = "";

/** Looks, shows what there is, and looks again in a while: not while nobody sees the page. */
async function refresh() {
  clearTimeout(next);
  if (looking) return;
  looking = true;
  /** @type {number | null} */
  let wait = EVERY;
  try {
    show(await fetchGateway(readKey(ADMIN)));
    trouble("");
  } catch (error) {
    wait = await explain(/** @type {Error} */ (error));
  }
  looking = false;
  clearTimeout(next);
  if (wait !== null && !document.hidden) next = setTimeout(refresh, wait);
}

/** @param {Error} error @returns {Promise<number | null>} ms to wait; null: it makes no sense to ask again */
async function explain(error) {
  const status = error instanceof MoesaicError ? error.status : 0;
  if (status === 401 || status === 403) {
    if (await askKey("This page needs the key of an administrator.", ADMIN)) return 0;
    trouble(describe(error));
    return null;
  }
  trouble(status === 404 ? "This server has no admin routes. Only gateways have them." : describe(error));
  return EVERY;
}

/** @param {string} text */
function trouble(text) {
  const shown = byId("trouble");
  shown.hidden = text === "";
  if (shown.textContent !== text) shown.textContent = text;
  if (text) write("away", "not in touch");
}

/** @param {string} name @param {string} text */
function write(name, text) {
  const shown = byId("state");
  shown.dataset.state = name;
  if (shown.textContent !== text) shown.textContent = text; // else it would be read out each time
}

/** @param {import("./admin-api.js").Gateway} gateway */
function show(gateway) {
  state = gateway.status.state;
  write(state, WORDS[/** @type {keyof typeof WORDS} */ (state)] ?? state);
  const drain = byId("drain");
  drain.hidden = state === "stopping";
  drain.textContent = state === "draining" ? "Take requests again" : "Drain the gateway";
  byId("figures").replaceChildren(...figures(gateway));
  replace(byId("workers"), workers(gateway, actions));
  replace(byId("queues"), queues(gateway));
  replace(byId("dead"), dead(gateway, actions));
}

const PARTS = ["TABLE", "TBODY", "TR"];

/**
 * Shows something in the place of what was shown before, and leaves alone what says the same: else a button could be
 * taken away under the finger, and a selection from under the eyes.
 * @param {Element} root whose only child it is
 * @param {HTMLElement} made
 */
function replace(root, made) {
  if (root.firstElementChild) update(root.firstElementChild, made);
  else root.append(made);
}

/** @param {Element} old @param {Element} made */
function update(old, made) {
  if (old.isEqualNode(made)) return;
  const [before, now] = [[...old.children], [...made.children]];
  if (old.tagName === made.tagName && PARTS.includes(old.tagName) && before.length === now.length) {
    before.forEach((child, place) => update(child, now[place]));
    return;
  }
  const focused = old.contains(document.activeElement);
  old.replaceWith(made);
  if (focused) made.querySelector("button")?.focus({ preventScroll: true });
}

/** @param {() => Promise<{state: string}>} work @param {string} done what is said then */
async function act(work, done) {
  try {
    await work();
    notify(done);
  } catch (error) {
    notify(describe(error));
  }
  await refresh();
}

/**
 * Asks the reader whether that is meant.
 * @param {string} title @param {string} text @param {string} yes
 * @returns {Promise<boolean>}
 */
function sure(title, text, yes) {
  const dialog = /** @type {HTMLDialogElement} */ (byId("sure-dialog"));
  byId("sure-title").textContent = title;
  byId("sure-text").textContent = text;
  byId("sure-yes").textContent = yes;
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.onclose = () => resolve(dialog.returnValue === "yes");
  });
}

/** @type {import("./admin-tables.js").Actions} */
const actions = {
  async tell(what, name) {
    const text = "Others do what it has, and it is not let in again.";
    if (what === "dismiss" && !(await sure(`Dismiss ${name}?`, text, "Dismiss"))) return;
    const done = { drain: "is given nothing more", resume: "may work again", dismiss: "was dismissed" }[what];
    await act(() => controlWorker(what, name, readKey(ADMIN)), `${name} ${done}.`);
  },
  revive: (id) => void act(() => reviveJob(id, readKey(ADMIN)), `${id} is queued again.`),
};

byId("drain").addEventListener("click", async () => {
  const what = state === "draining" ? "resume" : "drain";
  const text = "New requests are refused until it takes them again; what is queued is done.";
  if (what === "drain" && !(await sure("Drain the gateway?", text, "Drain"))) return;
  await act(() => controlGateway(what, readKey(ADMIN)), what === "drain" ? "It takes nothing new." : "It takes requests again.");
});
byId("admin-key").addEventListener("click", async () => {
  if (await askKey("The key is sent to this gateway with every request.", ADMIN)) void refresh();
});
document.addEventListener("visibilitychange", () => {
  if (!document.hidden) void refresh();
});

offerThemes();
await refresh();
