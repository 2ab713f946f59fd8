/** The field where messages are written, and how the answer is coming along. */

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
   * @param {() => import("./api.js").Model | null} model the one that answers
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
    // While characters are composed (Chinese, Japanese ...), Enter chooses one. On a phone it begins a line.
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
   * Puts a text into the field.
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

  /** Shows what can be done now. */
  show() {
    const busy = this.chat.generation !== undefined;
    const stopping = document.activeElement === this.#stop;
    this.#send.hidden = busy;
    this.#stop.hidden = !busy;
    this.#send.disabled = this.#input.value.trim() === "" || this.model() === null;
    if (stopping && !busy) this.focus(); // the button under the keyboard is gone
    fit(this.#input);
    this.#showProgress();
  }

  #schedule() {
    if (this.#scheduled) return;
    this.#scheduled = true;
    setTimeout(() => {
      this.#scheduled = false;
      this.#showProgress();
    }, 200); // numbers that change faster cannot be read
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

  /** @returns {{tokens: number, rate: number | null, prompt: number}} of the answer being written, or of the last */
  #progress() {
    const { generation, conversation } = this.chat;
    if (generation) return generation.progress();
    const cost = conversation.messages.at(-1)?.cost;
    return { tokens: cost?.answer ?? 0, rate: cost?.rate ?? null, prompt: cost?.prompt ?? 0 };
  }
}
