/** Puts the page together: which part hears of what, the address, the keys that work everywhere. */

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
import { offerThemes } from "./themes.js";
import { Welcome } from "./welcome.js";

const chat = new Chat();
const models = new Models(chat, () => composer.show());
const composer = new Composer(chat, () => models.current);
const messages = new MessagesView(chat);
const welcome = new Welcome(chat, (start) => {
  composer.put(start);
  settingsView.show();
});
const settingsView = new SettingsView(chat, () => welcome.show());
const list = new Drawer(byId("sidebar"), "(min-width: 800px)", true);
const settings = new Drawer(byId("settings"), "(min-width: 1240px)", false);
const sidebar = new Sidebar(chat, () => list.close());

/** The address names the conversation, so that a reload, a bookmark and a second tab find it. */
function writeAddress() {
  const { id, title, messages: said } = chat.conversation;
  const address = said.length > 0 ? `#${id}` : "";
  if (location.hash !== address) history.replaceState(null, "", location.pathname + location.search + address);
  byId("title").textContent = title;
  document.title = title ? `${title} – Moesaic` : "Moesaic";
  /** @type {HTMLButtonElement} */ (byId("export")).disabled = said.length === 0;
}

async function readAddress() {
  const id = location.hash.slice(1);
  if (id) await chat.open(id);
  else if (chat.conversation.messages.length > 0) chat.fresh();
}

function startNew() {
  history.pushState(null, "", location.pathname + location.search);
  chat.fresh();
  list.close();
  composer.focus();
}

/** @param {unknown} error @param {() => void} again */
async function explain(error, again) {
  if (error instanceof Unauthorized && (await askKey(error.message))) again();
  else messages.fail(describe(error), again);
}

async function loadModels() {
  try {
    await models.load();
  } catch (error) {
    await explain(error, () => void loadModels());
  }
}

/** @param {KeyboardEvent} event */
function heedKey(event) {
  if (event.key !== "Escape" || event.defaultPrevented || event.isComposing || document.querySelector("dialog[open]")) return;
  const covering = [list, settings].find((drawer) => drawer.covers);
  if (covering) covering.close();
  else chat.stop();
}

chat.addEventListener("notice", (event) => notify(/** @type {CustomEvent} */ (event).detail));
chat.addEventListener("failed", (event) => {
  void explain(/** @type {CustomEvent} */ (event).detail, () => {
    if (!models.current) void loadModels();
    chat.proceed();
  });
});
chat.addEventListener("replaced", (event) => {
  const { count, undo } = /** @type {CustomEvent} */ (event).detail;
  notify(count === 1 ? "1 message was replaced." : `${count} messages were replaced.`, { label: "Undo", run: undo });
});
chat.addEventListener("ended", () => {
  if (models.current && models.current.state !== "loaded") void loadModels(); // it has been loaded by the question
});
addEventListener("hashchange", () => void readAddress());
addEventListener("popstate", () => void readAddress());
addEventListener("keydown", heedKey);
document.addEventListener("visibilitychange", () => {
  // Models may have been loaded or taken away meanwhile.
  if (!document.hidden && !chat.generation) void loadModels();
});
byId("new").addEventListener("click", startNew);
byId("skip").addEventListener("click", (event) => {
  event.preventDefault(); // the address belongs to the conversation
  composer.focus();
});
byId("sidebar-open").addEventListener("click", () => list.open());
byId("sidebar-close").addEventListener("click", () => list.close());
byId("settings-open").addEventListener("click", () => settings.toggle());
byId("settings-close").addEventListener("click", () => settings.dismiss());
byId("key-change").addEventListener("click", async () => {
  if (await askKey("The key is sent to this server with every request.")) void loadModels();
});

offerThemes();
await chat.recover();
await readAddress();
chat.addEventListener("opened", writeAddress); // only now: the address had to be read first
chat.addEventListener("stored", writeAddress);
writeAddress();
await Promise.all([sidebar.show(), loadModels()]);
if (matchMedia("(hover: hover)").matches && !document.querySelector("dialog[open]")) composer.focus();
