"use strict";
for (const example of document.querySelectorAll(".example")) {
  const controls = example.querySelector(".controls");
  const [play, slider, said, mode] = ["[data-play]", "input", "output", "[data-mode]"].map((name) => controls.querySelector(name));
  const moments = JSON.parse(example.dataset.moments);
  const seen = Number(example.dataset.seen);
  let timer = 0;
  const show = (at) => {
    slider.value = at;
    example.style.setProperty("--at", at);
    const text = moments[at] + (at < seen ? ", seen" : ", future");
    said.textContent = text;
    slider.setAttribute("aria-valuetext", text);
    example.classList.toggle("before", at < seen);
    example.classList.toggle("notlast", at < moments.length - 1);
  };
  const one = (on) => {
    example.classList.toggle("one", on);
    mode.textContent = on ? "Show all moments" : "Show one moment";
  };
  const stop = () => {
    clearInterval(timer);
    timer = 0;
    play.textContent = "Play";
  };
  play.addEventListener("click", () => {
    if (timer) { stop(); return; }
    one(true);
    play.textContent = "Pause";
    timer = setInterval(() => show((Number(slider.value) + 1) % moments.length), 600);
  });
  slider.addEventListener("input", () => { stop(); one(true); show(Number(slider.value)); });
  mode.addEventListener("click", () => { stop(); one(!example.classList.contains("one")); });
  show(moments.length - 1);
  controls.hidden = false;
  if ("plays" in example.dataset && !matchMedia("(prefers-reduced-motion: reduce)").matches) {
    show(0);
    play.click();
  }
}
