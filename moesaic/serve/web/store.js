/**
 * Conversations in the browser (IndexedDB), shared by all tabs.
 *
 * Every record carries a revision. A tab that writes over a revision it has not seen keeps its own conversation
 * as a copy instead, so that two tabs never overwrite each other. Knows nothing of what is shown.
 */

import { newId } from "./conversation.js";

/**
 * @typedef {import("./conversation.js").Conversation} Conversation
 * @typedef {{id: string, title: string, updated: number, size: number}} Summary what the list needs, without the messages
 * @typedef {{id: string, removed: boolean, live: boolean}} Change `live`: its answer is still being written
 */

const LARGEST_COUNT = 1000;
const LARGEST_SIZE = 100e6; // characters, of all conversations
const TABLES = ["summaries", "conversations"];

/** Nothing more can be kept; `message` is for the reader. */
export class StoreError extends Error {}

/**
 * Makes a promise of a request.
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
  /** @type {Promise<unknown>} what was asked last: saves of one conversation must not pass each other */
  #last = Promise.resolve();

  /** @param {(change: Change) => void} onChange told what another tab has changed */
  constructor(onChange) {
    try {
      this.#database = openDatabase();
    } catch (error) {
      this.#database = Promise.reject(error); // where storage is forbidden, naming indexedDB throws
    }
    this.#database.catch(() => undefined); // whoever uses it is told
    this.#channel.onmessage = (event) => onChange(event.data);
  }

  /**
   * Runs `work` in one transaction and returns its result once that is on disk.
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
      throw new StoreError("This browser stores nothing for this page: conversations last until the tab is closed.");
    }
    const ended = new Promise((resolve, reject) => {
      transaction.oncomplete = resolve;
      transaction.onabort = () => reject(transaction.error);
    });
    ended.catch(() => undefined); // if `work` fails first, its error is the one that counts
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
      throw new StoreError(full ? "The browser's storage is full: delete conversations, or export them first." : `Not stored: ${error}`);
    }
  }

  /** @returns {Promise<Summary[]>} newest first */
  async list() {
    const found = await this.#run("readonly", (summaries) => result(summaries.getAll()));
    return found.sort((one, other) => other.updated - one.updated);
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
   * Returns the ids of the conversations in which a text occurs, in whatever case.
   * @param {string} text
   * @returns {Promise<Set<string>>}
   */
  async search(text) {
    const wanted = text.toLowerCase();
    /** @param {string} content */
    const has = (content) => content.toLowerCase().includes(wanted);
    const found = (await this.all()).filter(({ title, messages }) => has(title) || messages.some(({ content }) => has(content)));
    return new Set(found.map(({ id }) => id));
  }

  /**
   * Stores a conversation as it is now and counts its revision up.
   *
   * If another tab has stored it meanwhile, `conversation` becomes a copy under a new id; if another tab has
   * removed it, nothing is stored.
   * @param {Conversation} conversation
   * @param {boolean} [live] whether its answer is still being written
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
    this.#tell({ id: conversation.id, removed: false, live });
    return outcome;
  }

  /**
   * Adds new conversations, all of them or none.
   * @param {Conversation[]} added
   */
  async add(added) {
    await this.#run("readwrite", (summaries, conversations) => this.#put(summaries, conversations, added));
    for (const { id } of added) this.#tell({ id, removed: false, live: false });
  }

  /** @param {string} id */
  async remove(id) {
    await this.#run("readwrite", (summaries, conversations) =>
      Promise.all([result(summaries.delete(id)), result(conversations.delete(id))]),
    );
    this.#tell({ id, removed: true, live: false });
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
    if (all.length > LARGEST_COUNT || all.reduce((sum, { size }) => sum + size, 0) > LARGEST_SIZE) {
      throw new StoreError(
        `No room for more: at most ${LARGEST_COUNT} conversations with ${LARGEST_SIZE / 1e6} million characters are kept. ` +
          "Delete some, or export them first.",
      );
    }
    for (const conversation of written) {
      summaries.put(summarize(conversation));
      conversations.put({ ...conversation, revision: conversation.revision + 1 });
    }
  }

  /** @param {Change} change */
  #tell(change) {
    this.#channel.postMessage(change);
  }
}
