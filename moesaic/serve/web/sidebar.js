/** The list of conversations: open, search, rename, delete, import and export. */

import { byId, download, element, iconButton } from "./dom.js";
import { exportAll, exportOne, ImportError, readFile } from "./conversation-file.js";
import { notify } from "./notices.js";

/** @typedef {import("./store.js").Summary} Summary */

const MAX_FILE_BYTES = 64 << 20;
const MAX_TITLE_LENGTH = 200;

export class Sidebar {
  #list = byId("conversations");
  #empty = byId("empty-list");
  #search = /** @type {HTMLInputElement} */ (byId("search"));
  #file = /** @type {HTMLInputElement} */ (byId("file"));
  #renaming = false;
  #searches = 0;
  #searchTimer = 0;

  /** @param {import("./chat.js").Chat} chat @param {() => void} onOpen called when the reader chooses a conversation */
  constructor(chat, onOpen) {
    this.chat = chat;
    this.onOpen = onOpen;
    this.#search.addEventListener("input", () => {
      clearTimeout(this.#searchTimer); // a search reads all conversations, so it waits for a pause in typing
      this.#searchTimer = setTimeout(() => void this.show(), 200);
    });
    byId("import").addEventListener("click", () => this.#file.click());
    this.#file.addEventListener("change", () => void this.#import());
    byId("export-all").addEventListener("click", () => void this.#exportAll());
    byId("export").addEventListener("click", () => this.#exportOne());
    for (const event of ["opened", "stored", "ended"]) chat.addEventListener(event, () => void this.show());
  }

  /** Shows the conversations that match the search. */
  async show() {
    const search = ++this.#searches;
    const wanted = this.#search.value.trim();
    const { store } = this.chat;
    /** @type {[Summary[], Set<string> | null]} */
    let [all, matches] = [[], null];
    try {
      [all, matches] = await Promise.all([store.list(), wanted ? store.search(wanted) : null]);
    } catch {
      // A notice has already said that nothing can be stored.
    }
    if (search !== this.#searches || this.#renaming) return; // there is a later search, or a title is being edited
    const shown = all.filter(({ id }) => matches?.has(id) ?? true);
    const focused = document.activeElement?.closest("li")?.dataset.id;
    const { busy } = this.chat;
    this.#list.replaceChildren(...shown.map((summary) => this.#row(summary, busy.has(summary.id))));
    /** @type {HTMLElement | null} */
    const again = focused ? this.#list.querySelector(`[data-id="${CSS.escape(focused)}"] a`) : null;
    again?.focus();
    this.#empty.hidden = shown.length > 0;
    this.#empty.textContent = wanted ? "Nothing found" : "Conversations are stored in this browser only.";
  }

  /** @param {Summary} summary @param {boolean} busy @returns {HTMLElement} */
  #row({ id, title }, busy) {
    const current = id === this.chat.conversation.id;
    const link = element("a", { href: `#${id}`, dir: "auto", title, "aria-current": current ? "page" : null }, title);
    link.addEventListener("click", () => this.onOpen());
    const rename = iconButton("edit", `Rename ${title}`, () => this.#rename(row, id, title));
    const remove = iconButton("delete", `Delete ${title}`, () => void this.#remove(id, title));
    const mark = busy ? element("span", { class: "busy", role: "img", "aria-label": "Answer in progress" }) : null;
    const row = element("li", { "data-id": id, class: current ? "current" : null }, link, mark, rename, remove);
    return row;
  }

  /** @param {HTMLElement} row @param {string} id @param {string} title */
  #rename(row, id, title) {
    const input = element("input", { type: "text", value: title, "aria-label": "Title", maxlength: String(MAX_TITLE_LENGTH), dir: "auto" });
    let open = true;
    /** @param {boolean} keep */
    const close = (keep) => {
      if (!open) return; // removing the field also causes a blur event
      open = this.#renaming = false;
      const name = input.value.trim();
      if (keep && name && name !== title) void this.chat.rename(id, name);
      else void this.show();
    };
    input.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== "Escape") return;
      event.stopPropagation();
      close(event.key === "Enter" && !event.isComposing);
    });
    input.addEventListener("blur", () => close(true));
    this.#renaming = true;
    row.replaceChildren(input);
    input.select();
    input.focus();
  }

  /** @param {string} id @param {string} title */
  async #remove(id, title) {
    const undo = await this.chat.remove(id);
    if (undo) notify(`“${title}” was deleted.`, { label: "Undo", run: () => void undo() });
  }

  async #import() {
    const file = this.#file.files?.[0];
    this.#file.value = ""; // so that the same file can be chosen again
    if (!file) return;
    try {
      if (file.size > MAX_FILE_BYTES) throw new ImportError("This file is too large. The limit is 64 MB.");
      const conversations = readFile(await file.text());
      await this.chat.add(conversations);
      notify(conversations.length === 1 ? "1 conversation was imported." : `${conversations.length} conversations were imported.`);
    } catch (error) {
      notify(/** @type {Error} */ (error).message);
    }
  }

  async #exportAll() {
    try {
      download("moesaic-conversations.json", exportAll(await this.chat.store.all()));
    } catch (error) {
      notify(/** @type {Error} */ (error).message);
    }
  }

  #exportOne() {
    const { conversation } = this.chat;
    const name = conversation.title.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "");
    download(`${name.slice(0, 60) || "conversation"}.json`, exportOne(conversation));
  }
}
