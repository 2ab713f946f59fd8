/** The list of messages of the open conversation, including the answer in progress. */

import { byId, element, textButton } from "./dom.js";
import { copyAndTell, MessageView } from "./message.js";
import { Scroller } from "./scroll.js";

/** @typedef {import("./conversation.js").Message} Message @typedef {import("./generation.js").Generation} Generation */

const FRAME_BUDGET_MS = 8; // time for showing new text within one frame

export class MessagesView {
  #root = byId("messages");
  #spoken = byId("spoken");
  #scroller = new Scroller(byId("scroll"), byId("to-bottom"));
  #loading = element("span");
  #waiting = element("div", { class: "waiting", "aria-hidden": "true" }, element("i"), element("i"), element("i"), this.#loading);
  /** @type {WeakMap<Message, MessageView>} */
  #views = new WeakMap();
  #opened = "";
  #scheduled = false;

  /** @param {import("./chat.js").Chat} chat */
  constructor(chat) {
    this.chat = chat;
    /** @type {import("./message.js").Actions} */
    this.actions = {
      editQuestion: (message, text) => chat.editQuestion(this.#indexOf(message), text),
      editAnswer: (message, text, continueFrom) => chat.editAnswer(this.#indexOf(message), text, continueFrom),
      regenerate: (message) => chat.regenerate(this.#indexOf(message)),
      continueAnswer: () => chat.continueAnswer(),
    };
    this.#root.addEventListener("click", (event) => {
      const button = /** @type {Element} */ (event.target).closest("button");
      if (button?.dataset.action !== "copy-code") return;
      void copyAndTell(button.closest(".code")?.querySelector("code")?.textContent ?? "", button);
    });
    chat.addEventListener("opened", () => this.show());
    chat.addEventListener("grew", () => this.#schedule());
    chat.addEventListener("ended", () => this.#end());
  }

  /** @param {Message} message @returns {number} */
  #indexOf(message) {
    return this.chat.conversation.messages.indexOf(message);
  }

  /** @param {Message} message @returns {MessageView} */
  #viewOf(message) {
    const view = this.#views.get(message) ?? new MessageView(message, this.actions);
    this.#views.set(message, view);
    return view;
  }

  /** Shows the current messages of the conversation. */
  show() {
    const { conversation, generation } = this.chat;
    const views = conversation.messages.map((message) => this.#viewOf(message));
    const nodes = views.map(({ node }) => node);
    const shown = [...this.#root.querySelectorAll("article")];
    const changed = nodes.findIndex((node, index) => shown[index] !== node);
    const from = changed < 0 ? nodes.length : changed;
    // Unchanged nodes stay in the page, so that the selection, an open editor and the scroll position survive.
    for (const node of [...this.#root.children].slice(from)) node.remove();
    this.#root.append(...nodes.slice(from));
    views.forEach((view, index) => {
      view.grow();
      view.update({
        last: index === views.length - 1,
        writing: generation !== undefined && view.message === generation.message,
        busy: generation !== undefined,
      });
    });
    if (generation && !generation.begun) this.#wait(generation.message);
    if (this.chat.elsewhere) this.#root.append(element("p", { class: "elsewhere" }, "Another tab is receiving the answer."));
    const isOther = this.#opened !== conversation.id;
    this.#opened = conversation.id;
    if (views.length === 0) this.#scroller.reset();
    else if (isOther || generation) this.#scroller.pin();
    else this.#scroller.follow();
  }

  /** Shows that the answer has not begun. @param {Message} message */
  #wait(message) {
    this.#viewOf(message).takeSettled(); // a continued text was read out before
    this.#root.append(this.#waiting);
    this.#spoken.replaceChildren(element("p", {}, "Answering"));
  }

  /** Shows that the answer waits for its model. @param {string} model the model's name; "": it does not wait */
  showLoading(model) {
    const text = model && `Loading ${model} …`;
    if (this.#loading.textContent === text) return;
    this.#loading.textContent = text;
    if (text) this.#spoken.append(element("p", {}, text));
  }

  /** Shows new text in the next frame, because tokens can arrive faster than frames. */
  #schedule() {
    if (this.#scheduled) return;
    this.#scheduled = true;
    requestAnimationFrame(() => {
      const began = performance.now();
      this.#grow();
      const took = performance.now() - began;
      // Slow layouts are spaced out, so that the page stays responsive.
      setTimeout(
        () => {
          this.#scheduled = false;
          if (this.chat.generation) this.#schedule();
        },
        took > FRAME_BUDGET_MS ? 4 * took : 0,
      );
    });
  }

  #grow() {
    const { generation } = this.chat;
    if (!generation?.begun) return;
    this.#waiting.remove();
    const view = this.#viewOf(generation.message);
    if (view.node.isConnected) view.grow();
    else this.show();
    this.#speak(view.takeSettled());
    this.#scroller.follow();
  }

  /**
   * Adds complete blocks to the live region for screen readers. A live region around the text would read every token.
   * @param {readonly HTMLElement[]} nodes
   */
  #speak(nodes) {
    this.#spoken.append(...nodes.map((node) => element("p", { dir: "auto" }, node.textContent)));
  }

  #end() {
    this.#waiting.remove();
    this.show();
    const last = this.chat.conversation.messages.at(-1);
    if (last?.role !== "assistant") return;
    const view = this.#viewOf(last);
    this.#speak([...view.takeSettled(), ...view.tail]);
    this.#spoken.append(element("p", {}, last.cut ? "The answer is not complete." : "End of the answer."));
  }

  /**
   * Shows an error below the messages, with a button to try again.
   * @param {string} text
   * @param {() => void} retry
   */
  showFailure(text, retry) {
    const button = textButton("Try again", "quiet-button", () => {
      failure.remove();
      retry();
    });
    const failure = element("div", { class: "failure", role: "alert" }, element("span", {}, text), button);
    this.#root.querySelector(".failure")?.remove();
    this.#root.append(failure);
    this.#scroller.follow();
  }
}
