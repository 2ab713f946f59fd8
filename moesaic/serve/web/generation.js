/** One answer while the model writes it: text, token counts, speed, and how it ended. Independent of the page. */

import { streamChat } from "./api.js";
import { requestFor } from "./conversation.js";

/** @typedef {import("./conversation.js").Conversation} Conversation @typedef {import("./conversation.js").Message} Message */

export class Generation {
  #controller = new AbortController();
  #pieces = 0;
  #firstAt = 0;
  #lastAt = 0;
  /** @type {import("./api.js").Usage | null} */
  #usage = null;
  #initialLength;

  /**
   * Prepares the next answer, or the continuation of the last message if it is the assistant's.
   * @param {Conversation} conversation
   */
  constructor(conversation) {
    this.conversation = conversation;
    this.body = requestFor(conversation);
    const last = conversation.messages.at(-1);
    /** @type {Message} */
    this.message = last?.role === "assistant" ? last : { role: "assistant", content: "", model: conversation.model };
    this.#initialLength = this.message.content.length;
  }

  /**
   * Writes the answer into the message and calls `onPiece` after each piece. The first piece adds the message to the
   * conversation. If the server fails, the error is thrown and the text received until then stays.
   * @param {string} key
   * @param {() => void} onPiece
   * @returns {Promise<void>}
   */
  async run(key, onPiece) {
    try {
      for await (const piece of streamChat(this.body, key, this.#controller.signal)) {
        this.#add(piece);
        onPiece();
      }
    } catch (error) {
      if (this.#controller.signal.aborted) return;
      if (this.begun) this.message.cut = "failed";
      throw error;
    } finally {
      const { prompt, tokens, rate } = this.progress();
      if (tokens > 0) this.message.cost = { prompt, answer: tokens, rate };
    }
    if (this.message.content === "") throw new Error("The model's answer is empty.");
  }

  /** @param {import("./api.js").Piece} piece */
  #add({ text, reason, usage }) {
    this.#usage = usage ?? this.#usage;
    if (text) {
      if (this.message.content === "") this.conversation.messages.push(this.message);
      if (!this.begun) this.message.cut = "stopped"; // the state to restore if the page is reloaded now
      this.#lastAt = performance.now();
      this.#firstAt ||= this.#lastAt;
      this.#pieces += 1;
      this.message.content += text;
    }
    if (reason === "length") this.message.cut = "length";
    else if (reason !== null) delete this.message.cut;
  }

  /** Stops the answer. The server notices that the connection is closed. */
  stop() {
    this.#controller.abort();
  }

  /** @returns {boolean} whether any text has arrived */
  get begun() {
    return this.message.content.length > this.#initialLength;
  }

  /**
   * Returns the length of the prompt in tokens (0: unknown), the tokens of the answer, and the tokens per second. If the
   * server does not report token counts, each piece counts as one token.
   * @returns {{prompt: number, tokens: number, rate: number | null}}
   */
  progress() {
    const tokens = this.#usage?.completion_tokens ?? this.#pieces;
    const seconds = (this.#lastAt - this.#firstAt) / 1000;
    const rate = tokens > 1 && seconds > 0 ? (tokens - 1) / seconds : null;
    return { prompt: this.#usage?.prompt_tokens ?? 0, tokens, rate };
  }
}
