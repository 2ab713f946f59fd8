/** One message on the page: its text, what can be done with it, and its editor. */

import { copy, element, icon, iconButton, textButton } from "./dom.js";
import { MarkdownView } from "./render.js";

/**
 * @typedef {import("./conversation.js").Message} Message
 * @typedef {{ask: (message: Message, text: string) => void,
 *   correct: (message: Message, text: string, goOn: boolean) => void,
 *   regenerate: (message: Message) => void, proceed: () => void}} Actions what the reader can do
 */

const CUTS = Object.freeze({
  stopped: "Stopped before the end.",
  length: "Reached the most new tokens.",
  failed: "Cut off by an error.",
});

export class MessageView {
  /** @type {MarkdownView | null} */
  #markdown = null;
  #body;
  #tools;
  #foot = element("div", { class: "message-foot" });
  #writing = false;

  /** @param {Message} message @param {Actions} actions */
  constructor(message, actions) {
    this.message = message;
    this.actions = actions;
    const answer = message.role === "assistant";
    this.#body = element("div", { class: "body" });
    this.#tools = element("div", { class: "tools", role: "group", "aria-label": "Actions" });
    this.node = element(
      "article",
      { class: `message ${message.role}`, "aria-label": answer ? "Answer" : "You" },
      this.#body,
      this.#foot,
      this.#tools,
    );
    this.#show();
    this.#tools.append(...this.#buttons(answer));
    if (answer && message.model) this.#tools.append(element("span", { class: "by" }, message.model));
  }

  #show() {
    this.#body.replaceChildren();
    if (this.message.role === "assistant") {
      this.#markdown = new MarkdownView(this.#body);
      this.#markdown.grow(this.message.content);
    } else {
      this.#body.append(element("div", { class: "plain", dir: "auto" }, this.message.content));
    }
  }

  /** @param {boolean} answer @returns {HTMLButtonElement[]} */
  #buttons(answer) {
    const { message, actions } = this;
    const copyButton = iconButton("copy", "Copy", () => void copyAndTell(message.content, copyButton));
    const edit = iconButton("edit", answer ? "Edit the answer" : "Edit", () => this.edit());
    if (!answer) return [copyButton, edit];
    return [copyButton, edit, iconButton("again", "Regenerate", () => actions.regenerate(message))];
  }

  /** Shows what has been added to the text. */
  grow() {
    this.#markdown?.grow(this.message.content);
  }

  /** @returns {HTMLElement[]} the paragraphs that have been completed since the last call */
  takeSettled() {
    return this.#markdown?.takeSettled() ?? [];
  }

  /** @returns {readonly HTMLElement[]} the end of the text, which may still change */
  get tail() {
    return this.#markdown?.tail ?? [];
  }

  /**
   * Fits what can be done to where the message stands.
   * @param {{last: boolean, writing: boolean, busy: boolean}} state `writing`: this is the answer being written;
   *   `busy`: one of the conversation's answers is
   */
  update({ last, writing, busy }) {
    this.#writing = writing;
    this.node.classList.toggle("writing", writing);
    this.node.classList.toggle("last", last);
    for (const button of this.#tools.querySelectorAll("button")) button.disabled = busy && button.ariaLabel !== "Copy";
    this.#showFoot(last, busy);
  }

  /** @param {boolean} last @param {boolean} busy */
  #showFoot(last, busy) {
    const { cut } = this.message;
    const parts = [];
    if (cut && !this.#writing) parts.push(element("span", { class: "cut" }, CUTS[cut]));
    if (cut && last && !busy) {
      const proceed = textButton("Continue", "quiet-button", () => this.actions.proceed());
      proceed.prepend(icon("continue"));
      parts.push(proceed);
    }
    this.#foot.replaceChildren(...parts);
  }

  /** Puts an editor in the place of the text. */
  edit() {
    const { message, actions } = this;
    const area = element("textarea", { class: "editor", dir: "auto", "aria-label": "Edit the text" });
    area.value = message.content;
    const close = () => {
      this.node.classList.remove("editing");
      this.#show();
      /** @type {HTMLElement | null} */ (this.#tools.children[1])?.focus();
    };
    /** @type {[string, () => void][]} the first is what Ctrl+Enter does */
    const choices =
      message.role === "user"
        ? [["Send", () => actions.ask(message, area.value)]]
        : [
            ["Save and continue", () => actions.correct(message, area.value, true)],
            ["Save", () => actions.correct(message, area.value, false)],
          ];
    const buttons = choices.map(([label, run], place) =>
      textButton(label, place === 0 ? "main-button" : "plain-button", () => area.value.trim() && run()),
    );
    area.addEventListener("keydown", (event) => {
      if (event.key === "Escape") close();
      else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) buttons[0].click();
      else return;
      event.preventDefault();
      event.stopPropagation(); // Escape stops an answer elsewhere
    });
    const row = element("div", { class: "buttons" }, textButton("Cancel", "plain-button", close), ...buttons.toReversed());
    this.node.classList.add("editing");
    this.#body.replaceChildren(area, row);
    area.focus();
    fit(area);
    area.addEventListener("input", () => fit(area));
  }
}

/**
 * Makes a text field as high as its text; the style sheet bounds it.
 * @param {HTMLTextAreaElement} area
 */
export function fit(area) {
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight + area.offsetHeight - area.clientHeight}px`;
}

/**
 * Copies a text and shows on the button whether that went well.
 * @param {string} text
 * @param {HTMLButtonElement} button
 */
export async function copyAndTell(text, button) {
  const done = await copy(text);
  const shown = button.querySelector("svg");
  const mark = icon(done ? "check" : "close");
  shown?.replaceWith(mark);
  setTimeout(() => mark.replaceWith(icon("copy")), 1500);
}
