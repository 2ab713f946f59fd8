/** Entry point of the chat page: connects the views to the chat, the address bar and the global keys. */

import { describe } from "./api.js";
import { Chat } from "./chat.js";
import { Unauthorized } from "./client/index.js";
import { Composer } from "./composer.js";
import { byId } from "./dom.js";
import { Drawer } from "./drawer.js";
import { askKey } from "./key.js";
import { MessagesView } from "./messages.js";
import { Models } from "./models.js";
import { notify } from "./notices.js";
import { SettingsView } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import { showThemeButtons } from "./themes.js";
import { Waking } from "./waking.js";
import { Welcome } from "./welcome.js";

const chat = new Chat();
const models = new Models(chat, () => composer.show());
const composer = new Composer(chat, () => models.current);
const messages = new MessagesView(chat);
new Waking(chat, models, messages);
const welcome = new Welcome(chat, (start) => {
  composer.put(start);
  settingsView.show();
});
const settingsView = new SettingsView(chat, () => welcome.show());
const list = new Drawer(byId("sidebar"), "(min-width: 800px)", true);
const settings = new Drawer(byId("settings"), "(min-width: 1240px)", false);
const sidebar = new Sidebar(chat, () => list.close());

/** Writes the conversation's id into the address, so that a reload, a bookmark and a second tab open it. */
function writeAddress() {
  const { id, title, messages: turns } = chat.conversation;
  const address = turns.length > 0 ? `#${id}` : "";
  if (location.hash !== address) history.replaceState(null, "", location.pathname + location.search + address);
  byId("title").textContent = title;
  document.title = title ? `${title} – Moesaic` : "Moesaic";
  /** @type {HTMLButtonElement} */ (byId("export")).disabled = turns.length === 0;
}

/** Opens the conversation that the address names. */
async function readAddress() {
  const id = location.hash.slice(1);
  if (id) await chat.open(id);
  else if (chat.conversation.messages.length > 0) chat.startNew();
}

function startNew() {
  history.pushState(null, "", location.pathname + location.search);
  chat.startNew();
  list.close();
  composer.focus();
}

/** Shows an error, or asks for the API key if it is missing. @param {unknown} error @param {() => void} retry */
async function showError(error, retry) {
  if (error instanceof Unauthorized && (await askKey(error.message))) retry();
  else messages.showFailure(describe(error), retry);
}

async function loadModels() {
  try {
    await models.load();
  } catch (error) {
    await showError(error, () => void loadModels());
  }
}

/** @param {KeyboardEvent} event */
function onKeyDown(event) {
  if (event.key !== "Escape" || event.defaultPrevented || event.isComposing || document.querySelector("dialog[open]")) return;
  const covering = [list, settings].find((drawer) => drawer.covers);
  if (covering) covering.close();
  else chat.stop();
}

chat.addEventListener("notice", (event) => notify(/** @type {CustomEvent} */ (event).detail));
chat.addEventListener("failed", (event) => {
  void showError(/** @type {CustomEvent} */ (event).detail, () => {
    if (!models.current) void loadModels();
    chat.continueAnswer();
  });
});
chat.addEventListener("replaced", (event) => {
  const { count, undo } = /** @type {CustomEvent} */ (event).detail;
  notify(count === 1 ? "1 message was replaced." : `${count} messages were replaced.`, { label: "Undo", run: undo });
});
chat.addEventListener("ended", () => {
  if (models.current && models.current.state !== "loaded") void loadModels(); // the request has loaded it
});
addEventListener("hashchange", () => void readAddress());
addEventListener("popstate", () => void readAddress());
addEventListener("keydown", onKeyDown);
document.addEventListener("visibilitychange", () => {
  // The list of models may have changed while the page was hidden.
  if (!document.hidden && !chat.generation) void loadModels();
});
byId("new").addEventListener("click", startNew);
byId("skip").addEventListener("click", (event) => {
  event.preventDefault(); // the fragment of the address is the conversation's id
  composer.focus();
});
byId("sidebar-open").addEventListener("click", () => list.open());
byId("sidebar-close").addEventListener("click", () => list.close());
byId("settings-open").addEventListener("click", () => settings.toggle());
byId("settings-close").addEventListener("click", () => settings.dismiss());
byId("key-change").addEventListener("click", async () => {
  if (await askKey("The page sends this key to the server with every request.")) void loadModels();
});

showThemeButtons();
await chat.recover();
await readAddress();
chat.addEventListener("opened", writeAddress); // after the address has been read
chat.addEventListener("stored", writeAddress);
writeAddress();
await Promise.all([sidebar.show(), loadModels()]);
if (matchMedia("(hover: hover)").matches && !document.querySelector("dialog[open]")) composer.focus();
