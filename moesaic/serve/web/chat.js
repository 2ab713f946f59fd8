/**
 * The open conversation, the actions on it, and the answers in progress, also those of other conversations. This
 * module does not know the page; it emits events:
 *
 *   opened   a conversation was opened, or its messages changed
 *   grew     the answer in the open conversation has new text
 *   ended    the answer is complete, was stopped, or failed
 *   failed   an answer failed; detail: the error
 *   replaced messages were replaced; detail: {count, undo}
 *   stored   the list of conversations has changed
 *   notice   a message for the reader; detail: the text
 */

import { describe } from "./api.js";
import { newConversation, titleOf } from "./conversation.js";
import { Generation } from "./generation.js";
import { readKey, readLast, writeLast } from "./preferences.js";
import { recover, rescue } from "./rescue.js";
import { Store } from "./store.js";

/** @typedef {import("./conversation.js").Conversation} Conversation @typedef {import("./conversation.js").Message} Message */

const SAVE_INTERVAL_MS = 1000; // while an answer is in progress

export class Chat extends EventTarget {
  /** @type {Set<Generation>} */
  #running = new Set();
  /** @type {Map<Conversation, number>} number of unfinished saves of each conversation */
  #saving = new Map();
  /** Whether another tab receives an answer in the open conversation. */
  elsewhere = false;
  store = new Store((change) => this.#changedElsewhere(change));
  conversation = newConversation(readLast());

  constructor() {
    super();
    addEventListener("pagehide", () => {
      const running = [...this.#running].map(({ conversation }) => conversation);
      for (const conversation of new Set([...running, ...this.#saving.keys()])) rescue(conversation);
    });
  }

  /** @param {string} name @param {unknown} [detail] */
  #emit(name, detail) {
    this.dispatchEvent(new CustomEvent(name, { detail }));
  }

  /** @returns {Generation | undefined} the answer in progress in the open conversation */
  get generation() {
    return [...this.#running].find(({ conversation }) => conversation === this.conversation);
  }

  /** @returns {Set<string>} ids of the conversations with an answer in progress */
  get busy() {
    return new Set([...this.#running].map(({ conversation }) => conversation.id));
  }

  /** Restores answers that were in progress when an earlier page was closed. */
  async recover() {
    await this.#guarded(() => recover(this.store));
  }

  /** Starts a new conversation with the last used model and settings. */
  startNew() {
    this.#show(newConversation(readLast()));
  }

  /** @param {string} id */
  async open(id) {
    if (id === this.conversation.id) return;
    const running = [...this.#running].find(({ conversation }) => conversation.id === id);
    const conversation = running?.conversation ?? (await this.#guarded(() => this.store.get(id)));
    if (conversation) this.#show(conversation);
    else this.startNew();
  }

  /** @param {Conversation} conversation */
  #show(conversation) {
    this.conversation = conversation;
    this.elsewhere = false;
    this.#emit("opened");
  }

  /**
   * Adds a user message and requests the answer.
   * @param {string} text
   */
  send(text) {
    const { conversation } = this;
    conversation.messages.push({ role: "user", content: text });
    conversation.title ||= titleOf(text);
    this.#start();
  }

  /** Stops the answer in the open conversation. */
  stop() {
    this.generation?.stop();
  }

  /** Requests the next answer, or the continuation of the last one. */
  continueAnswer() {
    this.#start();
  }

  /**
   * Requests a new answer in place of the one at `index`, and removes the messages after it.
   * @param {number} index
   */
  regenerate(index) {
    this.#replace(index, []);
    this.#start();
  }

  /**
   * Replaces the user message at `index`, removes the messages after it, and requests an answer.
   * @param {number} index
   * @param {string} text
   */
  editQuestion(index, text) {
    this.#replace(index, [{ role: "user", content: text }]);
    this.#start();
  }

  /**
   * Replaces the text of the answer at `index`. If the model is to continue from it, the messages after it are removed.
   * @param {number} index
   * @param {string} text
   * @param {boolean} continueFrom
   */
  editAnswer(index, text, continueFrom) {
    const { messages } = this.conversation;
    const edited = { ...messages[index], content: text };
    this.#replace(index, [edited, ...(continueFrom ? [] : messages.slice(index + 1))]);
    if (continueFrom) this.#start();
    else void this.#changed();
  }

  /**
   * Changes model, system prompt, settings or title.
   * @param {Partial<Conversation>} fields
   */
  async change(fields) {
    Object.assign(this.conversation, fields);
    writeLast(this.conversation);
    if (this.conversation.messages.length > 0) await this.#save(this.conversation);
  }

  /** @param {string} id @param {string} title */
  async rename(id, title) {
    if (id === this.conversation.id) return this.change({ title });
    const conversation = await this.#guarded(() => this.store.get(id));
    if (conversation) await this.#save(Object.assign(conversation, { title }));
  }

  /**
   * Deletes a conversation.
   * @param {string} id
   * @returns {Promise<(() => Promise<void>) | null>} a function that restores it
   */
  async remove(id) {
    for (const generation of this.#running) if (generation.conversation.id === id) generation.stop();
    const removed = await this.#guarded(() => this.store.get(id));
    await this.#guarded(() => this.store.remove(id));
    if (id === this.conversation.id) this.startNew();
    this.#emit("stored");
    return removed ? () => this.#save({ ...removed, revision: 0 }) : null;
  }

  /** @param {Conversation[]} conversations */
  async add(conversations) {
    await this.store.add(conversations);
    this.#emit("stored");
  }

  /**
   * Replaces all messages from `index` on, and offers the reader to undo that.
   * @param {number} index
   * @param {Message[]} messages
   */
  #replace(index, messages) {
    const { conversation } = this;
    const before = conversation.messages;
    conversation.messages = [...before.slice(0, index), ...messages];
    const count = before.filter((message) => !conversation.messages.includes(message)).length;
    const undo = () => {
      for (const generation of this.#running) if (generation.conversation === conversation) generation.stop();
      conversation.messages = before;
      if (conversation === this.conversation) void this.#changed();
      else void this.#save(conversation);
    };
    this.#emit("replaced", { count, undo });
  }

  /** Shows and saves the open conversation after its messages changed. */
  async #changed() {
    this.#emit("opened");
    await this.#save(this.conversation);
  }

  /** Requests an answer in the open conversation. */
  #start() {
    const { conversation } = this;
    if (this.generation) return;
    conversation.updated = Date.now();
    writeLast(conversation);
    void this.#save(conversation);
    const generation = new Generation(conversation);
    this.#running.add(generation);
    this.#emit("opened");
    void this.#follow(generation);
  }

  /** Runs an answer to its end, and saves it while it grows. @param {Generation} generation */
  async #follow(generation) {
    const { conversation } = generation;
    let saved = performance.now();
    /** @type {unknown} */
    let failure = null;
    try {
      await generation.run(readKey(), () => {
        if (conversation === this.conversation) this.#emit("grew");
        if (performance.now() - saved < SAVE_INTERVAL_MS) return;
        saved = performance.now();
        void this.#save(conversation, true);
      });
    } catch (error) {
      failure = error;
    }
    this.#running.delete(generation);
    if (conversation === this.conversation) {
      this.#emit("ended");
      if (failure) this.#emit("failed", failure);
    } else if (failure) this.#emit("notice", `“${conversation.title}”: ${describe(failure)}`);
    await this.#save(conversation);
  }

  /** @param {Conversation} conversation @param {boolean} [live] */
  async #save(conversation, live = false) {
    const { id } = conversation;
    this.#saving.set(conversation, (this.#saving.get(conversation) ?? 0) + 1);
    const outcome = await this.#guarded(() => this.store.save(conversation, live));
    const waiting = /** @type {number} */ (this.#saving.get(conversation)) - 1;
    if (waiting > 0) this.#saving.set(conversation, waiting);
    else this.#saving.delete(conversation);
    if (outcome === "copied") {
      this.#emit("notice", "This conversation was continued in another tab. The version from this tab was kept as a copy.");
    }
    if (outcome === "removed" && !live && conversation === this.conversation) {
      this.#emit("notice", "This conversation was deleted in another tab. New messages here are not saved.");
    }
    if (id !== conversation.id && conversation === this.conversation) this.#emit("opened");
    if (!live) this.#emit("stored");
  }

  /**
   * Runs work on the store; a failure becomes a notice to the reader.
   * @template T
   * @param {() => Promise<T>} work
   * @returns {Promise<T | undefined>}
   */
  async #guarded(work) {
    try {
      return await work();
    } catch (error) {
      this.#emit("notice", /** @type {Error} */ (error).message);
      return undefined;
    }
  }

  /** Shows a change that another tab made. @param {import("./store.js").Change} change */
  async #changedElsewhere({ id, removed, live }) {
    this.#emit("stored");
    if (id !== this.conversation.id || this.generation) return;
    if (removed) {
      this.startNew();
      this.#emit("notice", "This conversation was deleted in another tab.");
      return;
    }
    const stored = await this.#guarded(() => this.store.get(id));
    if (!stored || id !== this.conversation.id || this.generation) return;
    const before = this.conversation.messages;
    // Unchanged messages stay the same objects, so that the page keeps their nodes.
    stored.messages = stored.messages.map((message, index) => (same(message, before[index]) ? before[index] : message));
    this.conversation = stored;
    this.elsewhere = live;
    this.#emit("opened");
  }
}

/** @param {Message} one @param {Message | undefined} other @returns {boolean} */
const same = (one, other) => one.role === other?.role && one.content === other.content && one.cut === other.cut;
