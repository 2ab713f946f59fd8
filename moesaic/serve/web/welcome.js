/** The start screen of an empty conversation: example system prompts by language. */

import { byId, element, textButton } from "./dom.js";
import { LANGUAGES } from "./examples.js";

export class Welcome {
  #root = byId("welcome");
  #cards = element("div", { class: "cards" });
  #languages;

  /** @param {import("./chat.js").Chat} chat @param {(start: string) => void} propose fills in a first message */
  constructor(chat, propose) {
    this.chat = chat;
    this.propose = propose;
    this.#languages = LANGUAGES.map(({ language, code }, index) => {
      const button = textButton(language, "chip", () => this.#choose(index));
      button.lang = code;
      return button;
    });
    const logo = element("img", { src: new URL("logo.svg", import.meta.url).href, alt: "", width: "52", height: "52" });
    this.#root.append(
      logo,
      element("p", { class: "greeting" }, "What would you like to talk about?"),
      element("p", { class: "hint" }, "Write a message, or start with one of these roles."),
      element("div", { class: "chips", role: "group", "aria-label": "Language" }, ...this.#languages),
      this.#cards,
    );
    this.#choose(Math.max(0, LANGUAGES.findIndex(({ code }) => navigator.language.startsWith(code))));
    chat.addEventListener("opened", () => this.show());
    this.show();
  }

  /** @param {number} index of the language */
  #choose(index) {
    const { code, examples } = LANGUAGES[index];
    this.#languages.forEach((button, other) => button.setAttribute("aria-pressed", String(other === index)));
    this.#cards.lang = code;
    this.#cards.replaceChildren(
      ...examples.map(({ name, about, system, start }) => {
        const card = element("button", { type: "button", class: "card" }, element("strong", {}, name), element("span", {}, about));
        card.addEventListener("click", () => {
          void this.chat.change({ system });
          this.show();
          this.propose(start);
        });
        card.dataset.system = system;
        return card;
      }),
    );
    this.show();
  }

  /** Shows the examples while the conversation is empty. */
  show() {
    const { messages, system } = this.chat.conversation;
    this.#root.hidden = messages.length > 0 || this.chat.generation !== undefined;
    for (const card of /** @type {Iterable<HTMLElement>} */ (this.#cards.children)) {
      card.setAttribute("aria-pressed", String(system !== "" && card.dataset.system === system));
    }
  }
}
