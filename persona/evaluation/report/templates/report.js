"use strict";
(() => {
  const books = JSON.parse(document.getElementById("browser-data").textContent);
  const pick = document.getElementById("pick");
  const state = document.getElementById("state");
  const search = document.getElementById("search");
  const list = document.getElementById("samples");
  const count = document.getElementById("count");
  const stack = document.getElementById("stack");
  const back = ["back", "back-below"].map((id) => document.getElementById(id));
  const next = ["next", "next-below"].map((id) => document.getElementById(id));
  const PER_PAGE = 5;
  let page = 0;

  // Everything shown comes from models and data files, so it only ever enters the page as text.
  const make = (tag, text, className) => {
    const node = document.createElement(tag);
    if (text !== undefined) node.textContent = text;
    if (className) node.className = className;
    return node;
  };

  const entry = (list, term, content) => {
    if (!content || (Array.isArray(content) && !content.length)) return;
    list.append(make("dt", term));
    const node = make("dd");
    if (Array.isArray(content)) {
      const items = make("ul");
      content.forEach((text) => items.append(make("li", text)));
      node.append(items);
    } else node.textContent = content;
    list.append(node);
  };

  const fold = (summary, className) => {
    const node = make("details", undefined, className);
    node.append(make("summary", summary));
    return node;
  };

  const talk = (messages) => {
    const node = make("div", undefined, "talk");
    messages.forEach(([role, text]) => {
      if (role) node.append(make("b", role));
      const said = make("div", text, role ? "said" : "said soft");
      said.tabIndex = 0;
      node.append(said);
    });
    return node;
  };

  const options = (sample) => {
    const node = make("ul", undefined, "options");
    sample.options.forEach((text, i) => {
      const right = text === sample.target;
      const item = make("li", text, right ? "true" : "");
      if (right) item.append(" ", make("span", "true", "tag"));
      sample.replies.filter((reply) => reply.chosen === i).forEach((reply) => item.append(" ", make("span", reply.stack, "tag")));
      node.append(item);
    });
    return node;
  };

  const verdicts = (given) => {
    const unread = given.filter((verdict) => verdict.reason).length;
    const node = fold(`${given.length} ${given.length === 1 ? "verdict" : "verdicts"}${unread ? `, ${unread} unreadable` : ""}`);
    given.forEach((verdict) => {
      const one = make("div", undefined, "verdict");
      one.append(make("span", `${verdict.judge} · ${verdict.rubric}: `, "soft"));
      one.append(verdict.reason ? make("span", `unreadable: ${verdict.reason}`, "down") : make("b", verdict.value));
      if (verdict.raw) {
        const raw = fold("what the judge wrote");
        raw.append(make("div", verdict.raw, "said"));
        one.append(raw);
      }
      node.append(one);
    });
    return node;
  };

  const answer = (reply, book) => {
    const node = make("div", undefined, "answer");
    const head = make("div", undefined, "who");
    head.append(make("b", reply.stack), " ");
    if (reply.outcome === "wrong") head.append(make("span", book.wrong, "tag down"), " ");
    if (reply.reason) head.append(make("span", `unscored: ${reply.reason}`, "down"), " ");
    Object.entries(reply.cut).forEach(([role, n]) => head.append(make("span", `${n} tokens cut from prompts of ${role}`, "tag down"), " "));
    Object.entries(reply.values).forEach(([name, value]) => head.append(make("span", `${name} ${value}`, "figure"), " "));
    node.append(head, make("div", reply.raw || "(empty reply)", reply.raw ? "said" : "said soft"));
    if (reply.transcript.length) {
      const whole = fold(`conversation of ${reply.transcript.length} messages`);
      whole.append(talk(reply.transcript));
      node.append(whole);
    }
    if (reply.verdicts.length) node.append(verdicts(reply.verdicts));
    return node;
  };

  const card = ({ sample, book }) => {
    const node = make("article", undefined, "card sample");
    node.append(make("h4", [book.benchmark, sample.id, sample.task].filter(Boolean).join(" · ")));
    const facts = make("dl");
    const who = sample.description && sample.description !== sample.persona ? `${sample.persona}: ${sample.description}` : sample.persona;
    entry(facts, "persona", who);
    const more = sample.n_items - sample.items.length;
    if (sample.n_items) entry(facts, sample.n_items === 1 ? "1 item" : `${sample.n_items} items`, more > 0 ? [...sample.items, `… and ${more} more`] : sample.items);
    entry(facts, "groups", Object.entries(sample.groups).map(([key, value]) => `${key}: ${value}`).join(", "));
    node.append(facts, talk(sample.messages));
    if (sample.options) {
      const choice = make("div", undefined, "talk");
      choice.append(make("b", "options"), options(sample));
      node.append(choice);
    }
    if (sample.target && !(sample.options || []).includes(sample.target)) node.append(talk([["target", sample.target]]));
    sample.replies.filter((reply) => !stack.value || reply.stack === stack.value).forEach((reply) => node.append(answer(reply, book)));
    return node;
  };

  const differ = (replies) => new Set(replies.map((reply) => JSON.stringify([reply.values, reply.reason]))).size > 1;
  const wanted = {
    all: () => true,
    scored: (replies) => replies.some((reply) => reply.outcome !== "unscored"),
    unscored: (replies) => replies.some((reply) => reply.outcome === "unscored"),
    wrong: (replies) => replies.some((reply) => reply.outcome === "wrong"),
    differ,
  };

  const texts = new Map(); // lower-cased once, when first searched
  const text = (sample) => {
    if (!texts.has(sample)) texts.set(sample, JSON.stringify(sample).toLowerCase());
    return texts.get(sample);
  };

  const show = () => {
    const words = JSON.stringify(search.value.trim().toLowerCase()).slice(1, -1);
    const shelf = books.filter((book, i) => pick.value === "" || pick.value === String(i));
    const all = shelf.flatMap((book) => book.samples.map((sample) => ({ book, sample })));
    const found = all.filter(({ sample }) => {
      const replies = stack.value && state.value !== "differ" ? sample.replies.filter((reply) => reply.stack === stack.value) : sample.replies;
      return replies.length > 0 && wanted[state.value](replies) && (!words || text(sample).includes(words));
    });
    const pages = Math.max(1, Math.ceil(found.length / PER_PAGE));
    page = Math.min(Math.max(page, 0), pages - 1);
    list.replaceChildren(...found.slice(page * PER_PAGE, (page + 1) * PER_PAGE).map(card));
    count.textContent = found.length ? `${found.length} of ${all.length} samples, page ${page + 1} of ${pages}` : "no sample fits";
    back.forEach((button) => { button.disabled = page === 0; });
    next.forEach((button) => { button.disabled = page === pages - 1; });
  };

  document.querySelectorAll(".toggle").forEach((button) => button.addEventListener("click", () => {
    const off = button.getAttribute("aria-pressed") === "true";
    button.setAttribute("aria-pressed", String(!off));
    button.closest(".history").querySelectorAll(`g[data-series="${button.dataset.series}"]`)
      .forEach((group) => group.classList.toggle("off", off));
  }));

  books.forEach((book, i) => {
    const option = make("option", book.benchmark);
    option.value = i;
    pick.append(option);
  });
  [pick, stack, state, search].forEach((control) => control.addEventListener("input", () => { page = 0; show(); }));
  const turn = (by) => () => { page += by; show(); if (document.getElementById("browser").getBoundingClientRect().top < 0) list.scrollIntoView(); };
  back.forEach((button) => button.addEventListener("click", turn(-1)));
  next.forEach((button) => button.addEventListener("click", turn(1)));
  show();
})();
