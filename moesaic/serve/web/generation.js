/** One answer while it is written: its text, its tokens, its speed, and how it ended. Knows no page. */

import { ApiError, streamChat } from "./api.js";
import { requestFor } from "./conversation.js";

/** @typedef {import("./conversation.js").Conversation} Conversation @typedef {import("./conversation.js").Message} Message */

export class Generation {
  #controller = new AbortController();
  #pieces = 0;
  #firstAt = 0;
  #lastAt = 0;
  /** @type {import("./api.js").Usage | null} */
  #usage = null;
  #begin;

  /**
   * Prepares the next answer, or more of the last message if that is the assistant's.
   * @param {Conversation} conversation
   */
  constructor(conversation) {
    this.conversation = conversation;
    this.body = requestFor(conversation);
    const last = conversation.messages.at(-1);
    /** @type {Message} */
    this.message = last?.role === "assistant" ? last : { role: "assistant", content: "", model: conversation.model };
    this.#begin = this.message.content.length;
  }

  /**
   * Writes the answer into the message, which joins the conversation with its first piece; `onPiece` is called
   * whenever it has grown.
   * Raises ApiError if the server refuses, or fails on the way; what had come by then stays.
   * @param {string} key
   * @param {() => void} onPiece
   * @returns {Promise<void>}
   */
  async run(key, onPiece) {
    try {
      for await (const piece of streamChat(this.body, key, this.#controller.signal)) {
        this.#take(piece);
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
    if (this.message.content === "") throw new ApiError("The model's answer is empty.");
  }

  /** @param {import("./api.js").Piece} piece */
  #take({ text, finish, usage }) {
    this.#usage = usage ?? this.#usage;
    if (text) {
      if (this.message.content === "") this.conversation.messages.push(this.message);
      if (!this.begun) this.message.cut = "stopped"; // what a reload in mid-answer leaves behind
      this.#lastAt = performance.now();
      this.#firstAt ||= this.#lastAt;
      this.#pieces += 1;
      this.message.content += text;
    }
    if (finish === "length") this.message.cut = "length";
    else if (finish !== null) delete this.message.cut;
  }

  /** Ends the answer here; the server is told by the closed connection. */
  stop() {
    this.#controller.abort();
  }

  /** @returns {boolean} whether something of the answer has come */
  get begun() {
    return this.message.content.length > this.#begin;
  }

  /**
   * Returns the tokens so far, how many of them come in a second, and how long the prompt is (0: not known yet).
   * A server that does not count along is believed to send one token at a time.
   * @returns {{prompt: number, tokens: number, rate: number | null}}
   */
  progress() {
    const tokens = this.#usage?.completion_tokens ?? this.#pieces;
    const seconds = (this.#lastAt - this.#firstAt) / 1000;
    const rate = tokens > 1 && seconds > 0 ? (tokens - 1) / seconds : null;
    return { prompt: this.#usage?.prompt_tokens ?? 0, tokens, rate };
  }
}
