/**
 * The conversation that is open, what can be done with it, and the answers that are being written (also of
 * conversations that are not open). Knows no page; it tells by events:
 *
 *   opened   another conversation is open, or other messages are in this one
 *   grew     the answer in the open conversation has grown
 *   ended    it is complete, was stopped, or failed
 *   failed   something went wrong; detail: the error
 *   replaced messages have been replaced; detail: {count, undo}
 *   stored   the list of conversations has changed
 *   notice   something to tell the reader; detail: the text
 */

import { describe } from "./api.js";
import { newConversation, titleOf } from "./conversation.js";
import { Generation } from "./generation.js";
import { readKey, readLast, writeLast } from "./preferences.js";
import { recover, rescue } from "./rescue.js";
import { Store } from "./store.js";

/** @typedef {import("./conversation.js").Conversation} Conversation @typedef {import("./conversation.js").Message} Message */

const SAVE_EVERY = 1000; // ms, while an answer is being written

export class Chat extends EventTarget {
  /** @type {Set<Generation>} */
  #running = new Set();
  /** @type {Map<Conversation, number>} what is not on disk yet, and how often it is waiting for that */
  #saving = new Map();
  /** Whether another tab is writing the answer of the open conversation. */
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
  #tell(name, detail) {
    this.dispatchEvent(new CustomEvent(name, { detail }));
  }

  /** @returns {Generation | undefined} the answer being written in the open conversation */
  get generation() {
    return [...this.#running].find(({ conversation }) => conversation === this.conversation);
  }

  /** @returns {Set<string>} the conversations whose answers are being written */
  get busy() {
    return new Set([...this.#running].map(({ conversation }) => conversation.id));
  }

  /** Takes in what an earlier page was writing when it was left. */
  async recover() {
    await this.#guarded(() => recover(this.store));
  }

  /** Begins a new conversation with the model and the settings used last. */
  fresh() {
    this.#show(newConversation(readLast()));
  }

  /** @param {string} id */
  async open(id) {
    if (id === this.conversation.id) return;
    const running = [...this.#running].find(({ conversation }) => conversation.id === id);
    const found = running?.conversation ?? (await this.#guarded(() => this.store.get(id)));
    if (found) this.#show(found);
    else this.fresh();
  }

  /** @param {Conversation} conversation */
  #show(conversation) {
    this.conversation = conversation;
    this.elsewhere = false;
    this.#tell("opened");
  }

  /**
   * Says something and starts the answer.
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

  /** Asks for the next answer, or for more of the last one. */
  proceed() {
    this.#start();
  }

  /**
   * Answers anew, from the message before the `place`-th on.
   * @param {number} place an answer's
   */
  regenerate(place) {
    this.#replace(place, []);
    this.#start();
  }

  /**
   * Puts another question in the `place`-th place and goes on from there.
   * @param {number} place
   * @param {string} text
   */
  ask(place, text) {
    this.#replace(place, [{ role: "user", content: text }]);
    this.#start();
  }

  /**
   * Changes what the model has said; the messages after it stay, unless it is to go on from there.
   * @param {number} place
   * @param {string} text
   * @param {boolean} goOn
   */
  correct(place, text, goOn) {
    const { messages } = this.conversation;
    const corrected = { ...messages[place], content: text };
    this.#replace(place, [corrected, ...(goOn ? [] : messages.slice(place + 1))]);
    if (goOn) this.#start();
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
   * @returns {Promise<(() => Promise<void>) | null>} what brings it back
   */
  async remove(id) {
    for (const generation of this.#running) if (generation.conversation.id === id) generation.stop();
    const removed = await this.#guarded(() => this.store.get(id));
    await this.#guarded(() => this.store.remove(id));
    if (id === this.conversation.id) this.fresh();
    this.#tell("stored");
    return removed ? () => this.#save({ ...removed, revision: 0 }) : null;
  }

  /** @param {Conversation[]} conversations */
  async add(conversations) {
    await this.store.add(conversations);
    this.#tell("stored");
  }

  /**
   * Puts `messages` in the place of all from `place` on; the reader can undo that if something was lost.
   * @param {number} place
   * @param {Message[]} messages
   */
  #replace(place, messages) {
    const { conversation } = this;
    const before = conversation.messages;
    conversation.messages = [...before.slice(0, place), ...messages];
    const count = before.filter((message) => !conversation.messages.includes(message)).length;
    const undo = () => {
      for (const generation of this.#running) if (generation.conversation === conversation) generation.stop();
      conversation.messages = before;
      if (conversation === this.conversation) void this.#changed();
      else void this.#save(conversation);
    };
    this.#tell("replaced", { count, undo });
  }

  /** The messages of the open conversation are others now. */
  async #changed() {
    this.#tell("opened");
    await this.#save(this.conversation);
  }

  /** Starts an answer in the open conversation. */
  #start() {
    const { conversation } = this;
    if (this.generation) return;
    conversation.updated = Date.now();
    writeLast(conversation);
    void this.#save(conversation);
    const generation = new Generation(conversation);
    this.#running.add(generation);
    this.#tell("opened");
    void this.#follow(generation);
  }

  /** @param {Generation} generation */
  async #follow(generation) {
    const { conversation } = generation;
    let saved = performance.now();
    /** @type {unknown} */
    let failure = null;
    try {
      await generation.run(readKey(), () => {
        if (conversation === this.conversation) this.#tell("grew");
        if (performance.now() - saved < SAVE_EVERY) return;
        saved = performance.now();
        void this.#save(conversation, true);
      });
    } catch (error) {
      failure = error;
    }
    this.#running.delete(generation);
    if (conversation === this.conversation) {
      this.#tell("ended");
      if (failure) this.#tell("failed", failure);
    } else if (failure) this.#tell("notice", `“${conversation.title}”: ${describe(failure)}`);
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
      this.#tell("notice", "This conversation went on in another tab. What was said here is kept as a copy.");
    }
    if (outcome === "removed" && !live && conversation === this.conversation) {
      this.#tell("notice", "This conversation was deleted in another tab: what is said here now is not kept.");
    }
    if (id !== conversation.id && conversation === this.conversation) this.#tell("opened");
    if (!live) this.#tell("stored");
  }

  /**
   * Does something with the store; the reader is told if that fails.
   * @template T
   * @param {() => Promise<T>} work
   * @returns {Promise<T | undefined>}
   */
  async #guarded(work) {
    try {
      return await work();
    } catch (error) {
      this.#tell("notice", /** @type {Error} */ (error).message);
      return undefined;
    }
  }

  /** @param {import("./store.js").Change} change */
  async #changedElsewhere({ id, removed, live }) {
    this.#tell("stored");
    if (id !== this.conversation.id || this.generation) return;
    if (removed) {
      this.fresh();
      this.#tell("notice", "This conversation was deleted in another tab.");
      return;
    }
    const stored = await this.#guarded(() => this.store.get(id));
    if (!stored || id !== this.conversation.id || this.generation) return;
    const before = this.conversation.messages;
    // What has not changed stays the same object, and with it the nodes that show it.
    stored.messages = stored.messages.map((message, place) => (same(message, before[place]) ? before[place] : message));
    this.conversation = stored;
    this.elsewhere = live;
    this.#tell("opened");
  }
}

/** @param {Message} one @param {Message | undefined} other @returns {boolean} */
const same = (one, other) => one.role === other?.role && one.content === other.content && one.cut === other.cut;
