/** The model selector. */

import { listModels } from "./api.js";
import { byId, element } from "./dom.js";
import { readKey } from "./preferences.js";

/** @typedef {import("./api.js").Model} Model */

const STATE_LABELS = new Map([
  ["unloaded", " (loads on first use)"],
  ["loading", " (loading)"],
]);

export class Models {
  #select = /** @type {HTMLSelectElement} */ (byId("model"));
  /** @type {Model[]} */
  #all = [];

  /** @param {import("./chat.js").Chat} chat @param {() => void} changed */
  constructor(chat, changed) {
    this.chat = chat;
    this.changed = changed;
    this.#select.addEventListener("change", () => {
      void chat.change({ model: this.#select.value });
      changed();
    });
    chat.addEventListener("opened", () => this.show());
    this.show();
  }

  /** @returns {Model | null} the model of the open conversation */
  get current() {
    return this.#all.find(({ id }) => id === this.chat.conversation.model) ?? null;
  }

  /** Loads the list of models. Throws MoesaicError. */
  async load() {
    this.#all = await listModels(readKey());
    this.show();
    this.changed();
  }

  /** Shows the list. A conversation whose model is not available switches to the first model. */
  show() {
    const { conversation } = this.chat;
    if (this.#all.length > 0 && !this.current) conversation.model = this.#all[0].id;
    const options = this.#all.map(({ id, state }) => element("option", { value: id }, id + (STATE_LABELS.get(state) ?? "")));
    this.#select.replaceChildren(...options);
    this.#select.disabled = options.length === 0;
    if (options.length === 0) this.#select.append(element("option", {}, "No model"));
    else this.#select.value = conversation.model;
  }
}
