/**
 * Storage of conversations in the browser (IndexedDB), shared by all tabs.
 *
 * Every record has a revision. If a tab saves a conversation that another tab has changed, it saves a copy instead, so
 * that tabs never overwrite each other. This module does not know the page.
 */

import { newId } from "./conversation.js";

/**
 * @typedef {import("./conversation.js").Conversation} Conversation
 * @typedef {{id: string, title: string, updated: number, size: number}} Summary an entry of the list, without the messages
 * @typedef {{id: string, removed: boolean, live: boolean}} Change `live`: an answer is in progress
 */

const MAX_CONVERSATIONS = 1000;
const MAX_CHARACTERS = 100e6; // of all conversations together
const TABLES = ["summaries", "conversations"];

/** The conversation cannot be stored; `message` is for the reader. */
export class StoreError extends Error {}

/**
 * Returns a promise for the result of a request.
 * @template T
 * @param {IDBRequest<T>} request
 * @returns {Promise<T>}
 */
function result(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

/** @returns {Promise<IDBDatabase>} */
function openDatabase() {
  const request = indexedDB.open("moesaic", 1);
  request.onupgradeneeded = () => {
    for (const table of TABLES) request.result.createObjectStore(table, { keyPath: "id" });
  };
  return result(request);
}

/** @param {Conversation} conversation @returns {Summary} */
function summarize({ id, title, updated, system, messages }) {
  const size = messages.reduce((sum, message) => sum + message.content.length, title.length + system.length);
  return { id, title, updated, size };
}

export class Store {
  /** @type {Promise<IDBDatabase>} */
  #database;
  #channel = new BroadcastChannel("moesaic");
  /** @type {Promise<unknown>} the last operation; operations run in order, so that saves cannot overtake each other */
  #last = Promise.resolve();

  /** @param {(change: Change) => void} onChange called when another tab has changed a conversation */
  constructor(onChange) {
    try {
      this.#database = openDatabase();
    } catch (error) {
      this.#database = Promise.reject(error); // if storage is disabled, the access to indexedDB throws
    }
    this.#database.catch(() => undefined); // every operation reports the failure
    this.#channel.onmessage = (event) => onChange(event.data);
  }

  /**
   * Runs `work` in one transaction and returns its result after the commit.
   * @template T
   * @param {IDBTransactionMode} mode
   * @param {(summaries: IDBObjectStore, conversations: IDBObjectStore) => Promise<T>} work
   * @returns {Promise<T>}
   */
  #run(mode, work) {
    const next = this.#last.catch(() => undefined).then(() => this.#transact(mode, work));
    this.#last = next;
    return next;
  }

  /**
   * @template T
   * @param {IDBTransactionMode} mode
   * @param {(summaries: IDBObjectStore, conversations: IDBObjectStore) => Promise<T>} work
   * @returns {Promise<T>}
   */
  async #transact(mode, work) {
    let transaction;
    try {
      transaction = (await this.#database).transaction(TABLES, mode);
    } catch {
      throw new StoreError("This browser stores nothing for this page. Conversations last until the tab is closed.");
    }
    const ended = new Promise((resolve, reject) => {
      transaction.oncomplete = resolve;
      transaction.onabort = () => reject(transaction.error);
    });
    ended.catch(() => undefined); // if `work` fails first, its error is reported
    try {
      const value = await work(transaction.objectStore(TABLES[0]), transaction.objectStore(TABLES[1]));
      await ended;
      return value;
    } catch (error) {
      if (error instanceof StoreError) {
        transaction.abort();
        throw error;
      }
      const full = /** @type {Error | null} */ (error)?.name === "QuotaExceededError";
      throw new StoreError(full ? "The browser's storage is full. Delete conversations, or export them first." : `The conversation could not be stored: ${error}`);
    }
  }

  /** @returns {Promise<Summary[]>} newest first */
  async list() {
    const entries = await this.#run("readonly", (summaries) => result(summaries.getAll()));
    return entries.sort((one, other) => other.updated - one.updated);
  }

  /** @param {string} id @returns {Promise<Conversation | undefined>} */
  get(id) {
    return this.#run("readonly", (_, conversations) => result(conversations.get(id)));
  }

  /** @returns {Promise<Conversation[]>} */
  all() {
    return this.#run("readonly", (_, conversations) => result(conversations.getAll()));
  }

  /**
   * Returns the ids of the conversations that contain a text; case is ignored.
   * @param {string} text
   * @returns {Promise<Set<string>>}
   */
  async search(text) {
    const wanted = text.toLowerCase();
    /** @param {string} content */
    const has = (content) => content.toLowerCase().includes(wanted);
    const matches = (await this.all()).filter(({ title, messages }) => has(title) || messages.some(({ content }) => has(content)));
    return new Set(matches.map(({ id }) => id));
  }

  /**
   * Saves a conversation and increments its revision.
   *
   * If another tab has saved it in between, `conversation` becomes a copy with a new id. If another tab has deleted it,
   * nothing is saved.
   * @param {Conversation} conversation
   * @param {boolean} [live] whether an answer is in progress
   * @returns {Promise<"saved" | "copied" | "removed">}
   */
  async save(conversation, live = false) {
    const outcome = await this.#run("readwrite", async (summaries, conversations) => {
      const stored = await result(conversations.get(conversation.id));
      if (!stored && conversation.revision > 0) return "removed";
      const copied = (stored?.revision ?? 0) !== conversation.revision;
      if (copied) Object.assign(conversation, { id: newId(), revision: 0, title: `${conversation.title} (copy)` });
      await this.#put(summaries, conversations, [conversation]);
      return copied ? "copied" : "saved";
    });
    if (outcome === "removed") return outcome;
    conversation.revision += 1;
    this.#broadcast({ id: conversation.id, removed: false, live });
    return outcome;
  }

  /**
   * Adds new conversations, all of them or none.
   * @param {Conversation[]} added
   */
  async add(added) {
    await this.#run("readwrite", (summaries, conversations) => this.#put(summaries, conversations, added));
    for (const { id } of added) this.#broadcast({ id, removed: false, live: false });
  }

  /** @param {string} id */
  async remove(id) {
    await this.#run("readwrite", (summaries, conversations) =>
      Promise.all([result(summaries.delete(id)), result(conversations.delete(id))]),
    );
    this.#broadcast({ id, removed: true, live: false });
  }

  /**
   * @param {IDBObjectStore} summaries
   * @param {IDBObjectStore} conversations
   * @param {Conversation[]} written
   */
  async #put(summaries, conversations, written) {
    const ids = new Set(written.map(({ id }) => id));
    const others = (await result(summaries.getAll())).filter(({ id }) => !ids.has(id));
    const all = [...others, ...written.map(summarize)];
    if (all.length > MAX_CONVERSATIONS || all.reduce((sum, { size }) => sum + size, 0) > MAX_CHARACTERS) {
      throw new StoreError(
        `No room for more: the limit is ${MAX_CONVERSATIONS} conversations and ${MAX_CHARACTERS / 1e6} million characters. ` +
          "Delete some, or export them first.",
      );
    }
    for (const conversation of written) {
      summaries.put(summarize(conversation));
      conversations.put({ ...conversation, revision: conversation.revision + 1 });
    }
  }

  /** @param {Change} change */
  #broadcast(change) {
    this.#channel.postMessage(change);
  }
}
