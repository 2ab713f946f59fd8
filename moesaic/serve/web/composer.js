/** The message field with its buttons, and the status line with speed and context usage. */

import { byId } from "./dom.js";
import { fit } from "./message.js";

const NUMBERS = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const TENTHS = new Intl.NumberFormat("en", { minimumFractionDigits: 1, maximumFractionDigits: 1 });

export class Composer {
  #input = /** @type {HTMLTextAreaElement} */ (byId("input"));
  #send = /** @type {HTMLButtonElement} */ (byId("send"));
  #stop = /** @type {HTMLButtonElement} */ (byId("stop"));
  #scheduled = false;

  /**
   * @param {import("./chat.js").Chat} chat
   * @param {() => import("./api.js").Model | null} model returns the selected model
   */
  constructor(chat, model) {
    this.chat = chat;
    this.model = model;
    this.#input.addEventListener("input", () => this.show());
    this.#input.addEventListener("keydown", (event) => this.#key(event));
    this.#send.addEventListener("click", () => this.#submit());
    this.#stop.addEventListener("click", () => chat.stop());
    for (const event of ["opened", "ended"]) chat.addEventListener(event, () => this.show());
    chat.addEventListener("grew", () => this.#schedule());
    fit(this.#input);
    this.show();
  }

  /** @param {KeyboardEvent} event */
  #key(event) {
    // In an input method (Chinese, Japanese, ...) Enter selects a character. On a phone it starts a new line.
    const touch = matchMedia("(hover: none) and (pointer: coarse)").matches;
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229 || touch) return;
    event.preventDefault();
    this.#submit();
  }

  #submit() {
    if (this.#send.disabled || this.chat.generation) return;
    const text = this.#input.value;
    this.put("");
    this.chat.send(text);
  }

  /**
   * Sets the text of the field.
   * @param {string} text
   */
  put(text) {
    this.#input.value = text;
    this.#input.setSelectionRange(text.length, text.length);
    this.show();
    this.focus();
  }

  focus() {
    this.#input.focus({ preventScroll: true });
  }

  /** Updates the buttons and the status line. */
  show() {
    const busy = this.chat.generation !== undefined;
    const stopping = document.activeElement === this.#stop;
    this.#send.hidden = busy;
    this.#stop.hidden = !busy;
    this.#send.disabled = this.#input.value.trim() === "" || this.model() === null;
    if (stopping && !busy) this.focus(); // the focused button is now hidden
    fit(this.#input);
    this.#showProgress();
  }

  #schedule() {
    if (this.#scheduled) return;
    this.#scheduled = true;
    setTimeout(() => {
      this.#scheduled = false;
      this.#showProgress();
    }, 200); // faster changes are unreadable
  }

  #showProgress() {
    const { tokens, rate, prompt } = this.#progress();
    const speed = rate === null ? "" : ` · ${(rate < 100 ? TENTHS : NUMBERS).format(rate)} tokens/s`;
    byId("speed").textContent = tokens === 0 ? "" : `${NUMBERS.format(tokens)} tokens${speed}`;
    const limit = this.model()?.context ?? null;
    byId("context").hidden = limit === null || prompt === 0;
    if (limit === null) return;
    const used = prompt + tokens;
    byId("context-text").textContent = `${NUMBERS.format(used)} of ${NUMBERS.format(limit)} context`;
    /** @type {HTMLProgressElement} */ (byId("context-bar")).value = Math.min(1, used / limit);
  }

  /** @returns {{tokens: number, rate: number | null, prompt: number}} of the answer in progress, or of the last one */
  #progress() {
    const { generation, conversation } = this.chat;
    if (generation) return generation.progress();
    const cost = conversation.messages.at(-1)?.cost;
    return { tokens: cost?.answer ?? 0, rate: cost?.rate ?? null, prompt: cost?.prompt ?? 0 };
  }
}
