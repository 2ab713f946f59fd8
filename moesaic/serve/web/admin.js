/** Entry point of the admin page: polls the state of a gateway or server and sends the administrator's actions. */

import { controlGateway, controlModel, controlWorker, fetchGateway, fetchModels, reviveJob } from "./admin-api.js";
import { deadLettersTable, figures, modelFigures, modelsTable, queuesTable, workersTable } from "./admin-tables.js";
import { describe } from "./api.js";
import { MoesaicError } from "./client/index.js";
import { byId } from "./dom.js";
import { askKey } from "./key.js";
import { notify } from "./notices.js";
import { ADMIN_KEY, readKey } from "./preferences.js";
import { showThemeButtons } from "./themes.js";

const POLL_MS = 2000;
const STATE_LABELS = { serving: "accepting requests", draining: "draining: no new requests", stopping: "stopping" };

/** @type {number | undefined} */
let timer;
let refreshing = false;
/** @type {string} the state shown last */
let state = "";
/** @type {"gateway" | "server" | null} null: not known yet */
let kind = null;

/** Shows the current state of the gateway or server and schedules the next refresh, unless the page is hidden. */
async function refresh() {
  clearTimeout(timer);
  if (refreshing) return;
  refreshing = true;
  /** @type {number | null} */
  let wait = POLL_MS;
  try {
    await showState();
    showProblem("");
  } catch (error) {
    wait = await handleError(/** @type {Error} */ (error));
  }
  refreshing = false;
  clearTimeout(timer);
  if (wait !== null && !document.hidden) timer = setTimeout(refresh, wait);
}

/** Asks for the state and shows it. Only gateways have the first route, and only servers the second. */
async function showState() {
  const key = readKey(ADMIN_KEY);
  if (kind !== "server") {
    try {
      showGateway(await fetchGateway(key));
      return;
    } catch (error) {
      if (kind === "gateway" || !(error instanceof MoesaicError && error.status === 404)) throw error;
    }
  }
  showServer(await fetchModels(key));
}

/** @param {"gateway" | "server"} found */
function setKind(found) {
  if (kind === found) return;
  kind = found;
  byId("kind").textContent = found === "gateway" ? "Gateway" : "Server";
  document.title = `${byId("kind").textContent} – Moesaic`;
  for (const section of document.querySelectorAll("main section")) {
    /** @type {HTMLElement} */ (section).hidden = !section.classList.contains(`of-${found}`);
  }
}

/** @param {Error} error @returns {Promise<number | null>} milliseconds until the next refresh; null: do not refresh */
async function handleError(error) {
  const status = error instanceof MoesaicError ? error.status : 0;
  if (status === 401 || status === 403) {
    if (await askKey("This page needs an administrator's API key.", ADMIN_KEY)) return 0;
    showProblem(describe(error));
    return null;
  }
  showProblem(status === 404 ? "This server has no admin routes on this port." : describe(error));
  return POLL_MS;
}

/** @param {string} text */
function showProblem(text) {
  const shown = byId("trouble");
  shown.hidden = text === "";
  if (shown.textContent !== text) shown.textContent = text;
  if (text) showBadge("away", "no connection");
}

/** @param {string} name @param {string} text */
function showBadge(name, text) {
  const shown = byId("state");
  shown.dataset.state = name;
  if (shown.textContent !== text) shown.textContent = text; // an unchanged text must not be announced again
}

/** @param {import("./admin-api.js").ModelServer} server */
function showServer(server) {
  setKind("server");
  showBadge("serving", "serving");
  byId("figures").replaceChildren(...modelFigures(server));
  replace(byId("models"), modelsTable(server, actions));
}

/** @param {import("./admin-api.js").Gateway} gateway */
function showGateway(gateway) {
  setKind("gateway");
  state = gateway.status.state;
  showBadge(state, STATE_LABELS[/** @type {keyof typeof STATE_LABELS} */ (state)] ?? state);
  const drain = byId("drain");
  drain.hidden = state === "stopping";
  drain.textContent = state === "draining" ? "Accept requests again" : "Drain the gateway";
  byId("figures").replaceChildren(...figures(gateway));
  replace(byId("workers"), workersTable(gateway, actions));
  replace(byId("queues"), queuesTable(gateway));
  replace(byId("dead"), deadLettersTable(gateway, actions));
}

const CONTAINERS = ["TABLE", "TBODY", "TR"];

/**
 * Replaces the only child of `root`, but keeps the parts that are equal. A button therefore does not vanish while it is
 * clicked, and a selection survives.
 * @param {Element} root
 * @param {HTMLElement} node
 */
function replace(root, node) {
  if (root.firstElementChild) update(root.firstElementChild, node);
  else root.append(node);
}

/** @param {Element} old @param {Element} node */
function update(old, node) {
  if (old.isEqualNode(node)) return;
  const [before, after] = [[...old.children], [...node.children]];
  if (old.tagName === node.tagName && CONTAINERS.includes(old.tagName) && before.length === after.length) {
    before.forEach((child, index) => update(child, after[index]));
    return;
  }
  const focused = old.contains(document.activeElement);
  old.replaceWith(node);
  if (focused) node.querySelector("button")?.focus({ preventScroll: true });
}

/** Runs an action, shows a notice, and refreshes. @param {() => Promise<unknown>} work @param {string} done the notice */
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
 * Asks the administrator to confirm.
 * @param {string} title @param {string} text @param {string} yes label of the confirm button
 * @returns {Promise<boolean>}
 */
function confirmAction(title, text, yes) {
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
  async controlWorker(action, name) {
    const text = "Other workers take over its jobs, and it cannot connect again.";
    if (action === "ban" && !(await confirmAction(`Ban ${name}?`, text, "Ban"))) return;
    const done = { drain: "is drained", resume: "accepts jobs again", ban: "was banned" }[action];
    await act(() => controlWorker(action, name, readKey(ADMIN_KEY)), `${name} ${done}.`);
  },
  async controlModel(action, name) {
    const text = "Its running answers end with an error.";
    if (action === "unload?force=true" && !(await confirmAction(`Unload ${name} now?`, text, "Unload now"))) return;
    const done = action === "load" ? "is loaded" : "is unloaded";
    const work = act(() => controlModel(action, name, readKey(ADMIN_KEY)), `${name} ${done}.`);
    await refresh(); // the action may take long, and the page shows its progress
    await work;
  },
  reviveJob: (id) => void act(() => reviveJob(id, readKey(ADMIN_KEY)), `${id} is queued again.`),
};

byId("drain").addEventListener("click", async () => {
  const action = state === "draining" ? "resume" : "drain";
  const text = "The gateway refuses new requests until you resume it. It completes the queued ones.";
  if (action === "drain" && !(await confirmAction("Drain the gateway?", text, "Drain"))) return;
  const done = action === "drain" ? "The gateway refuses new requests." : "The gateway accepts requests again.";
  await act(() => controlGateway(action, readKey(ADMIN_KEY)), done);
});
byId("admin-key").addEventListener("click", async () => {
  if (await askKey("The page sends this key with every request.", ADMIN_KEY)) void refresh();
});
document.addEventListener("visibilitychange", () => {
  if (!document.hidden) void refresh();
});

showThemeButtons();
await refresh();
