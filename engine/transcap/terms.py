"""The words of captions, as tables: which mean the same, which go together, which state nothing.

Knows English radiology words; does not know how they are found in a text. Strict on purpose: what is not quite the same
stands on lines of its own.
"""

SAME = {  # kind: meanings of one line each; phrases of a meaning are separated by commas, the first is its name
    "modality": """
        ct, ct scan, cat scan, computed tomography, computed tomographic, computerized tomography, ct image
        mri, mr, mri scan, mr scan, mr image, magnetic resonance, magnetic resonance imaging
        x ray, xray, radiograph, plain film, x ray film, plain radiograph, xr, radiography, radiographic
        ultrasound, ultrasonography, sonogram, sonography, us, sonographic, ultrasound scan, ultrasonographic
        doppler ultrasound, doppler sonogram, doppler ultrasonography
        doppler
        angiogram, angiography, angiographic
        venogram, venography
        myelogram, myelography
        mammogram, mammography, mammographic, mammograph
        barium, barium study
        fluoroscopy, fluoroscopic
        nuclear medicine scan, nuclear medicine, nuclear medicine study, scintigraphy, scintigram
        pet, pet scan, positron emission tomography
        spect
        tomography, tomographic, tomogram
        histology, histologic, histological, microscopy, microscopic, pathology slide
        photograph, photo
        endoscopy, endoscopic
        dermoscopy
        illustration, drawing, sketch
        schematic, diagram
        video
    """,
    "technique": """
        contrast, contrast enhanced, with contrast, contrast enhancement, contrast medium, contrast agent
        without contrast, noncontrast, non contrast, unenhanced, no contrast, non enhanced, non contrast enhanced
        gadolinium, gd, gadolinium enhanced, with gadolinium
        intravenous, iv
        t1, t1w, t1 weighted
        t2, t2w, t2 weighted
        flair, fluid attenuated inversion recovery
        dwi, diffusion weighted
        stir
        fiesta
    """,
    "plane": """
        axial
        transverse, transversal
        sagittal
        coronal
        lateral, lateral view
        frontal
        anteroposterior, ap
        posteroanterior, pa
        oblique
        longitudinal
        decubitus
        craniocaudal, cc
        mediolateral oblique, mlo
    """,
    "organ": """
        head
        brain, cerebral, cerebrum, intracerebral
        cerebellum, cerebellar
        skull, cranium, cranial
        intracranial
        face, facial
        sinus
        neck
        cervical
        orbit, orbital
        eye, ocular
        ear
        throat
        larynx, laryngeal
        pharynx, pharyngeal
        thyroid
        chest, thorax, thoracic
        lung, pulmonary
        mediastinum, mediastinal
        pleura, pleural
        heart, cardiac
        great vessel
        aorta, aortic
        rib
        diaphragm
        breast, mammary
        abdomen, abdominal
        liver, hepatic
        gallbladder
        kidney, renal
        spleen, splenic
        pancreas, pancreatic
        stomach, gastric
        esophagus, esophageal, oesophagus
        bowel, intestine, intestinal
        colon, colonic
        colorectal
        rectum, rectal
        appendix
        gastrointestinal, digestive, gi
        genitourinary, urogenital
        musculoskeletal
        vascular, vessel, blood vessel
        lymphatic, lymph node, lymph
        artery, arterial
        vein, venous
        bladder
        prostate, prostatic
        uterus, uterine
        ovary, ovarian
        testis, testicular
        pelvis, pelvic
        spine, spinal, vertebral column, spinal column
        vertebra
        lumbar
        disc, disk
        spinal cord
        bone, bony
        joint
        muscle, muscular
        shoulder
        arm
        elbow
        forearm
        wrist
        hand
        finger
        hip
        leg
        thigh
        femur, femoral
        knee
        tibia, tibial
        ankle
        foot, feet
        skin, dermal
        nerve
        tooth, teeth, dental
        heart and great vessel
        skull and content, skull and its content
        spine and content, spine and its content
        lung mediastinum pleura, lung mediastinum and pleura
        face sinus and neck
        vascular and lymphatic
    """,
    "side": """
        left, left sided
        right, right sided
        bilateral, bilaterally, both
        unilateral
    """,
    "negation": """
        no, not, without, absent, absence, negative, never, neither, nor, none, lack, lacking
        non
        free
        deny, denied
        cannot
    """,
    "hedge": """
        possible, possibly, may, might, could
        likely, probable, probably
        unlikely
        suspected, suspicious
        suggest, suggesting, suggestive
        questionable
        rule out, ruled out
        rather, instead, unlike, except
    """,
    "normality": """
        normal, unremarkable, no abnormality, no abnormal finding, normal appearance
        healthy
        intact
        clear
    """,
    "sex": """
        male, man, boy, men, he, his, him
        female, woman, girl, women, she, her, pregnant
    """,
    "age": """
        age, aged, old, year old
        adult
        elderly
        child, children, pediatric, paediatric
        infant, newborn, baby, neonatal
        teenager, teenage, adolescent
        young
    """,
    "finding": """
        fracture, fractured, broken
        tumor, tumour, neoplasm, neoplastic
        mass
        cancer, cancerous
        malignant, malignancy
        carcinoma
        metastasis, metastatic, metastases
        hemorrhage, haemorrhage, hemorrhagic, bleeding, bleed
        hematoma, haematoma
        edema, oedema
        effusion
        pneumonia
        pneumothorax
        nodule
        lesion
        cyst
        infarct, infarction, stroke
        embolism, embolus
        aneurysm
        stenosis
        calcification, calcified
        hernia
        herniation, herniated
        abscess
        infection, infected
        inflammation, inflamed
        opacity
        consolidation
        swelling, swollen
        obstruction, obstructed
        transplant, transplantation
        surgery, surgical, operation
        resection
        disease, diseased
        injury, injured
        trauma, traumatic
    """,
}
RELATED: dict[str, tuple[str, str]] = {  # name: (what it allows, what states it: `|` or, spaces and)
    "doppler ultrasound": ("ultrasound doppler", "doppler"),
    "heart and great vessel": ("heart great_vessel", "heart great_vessel"),
    "gadolinium": ("contrast", ""),
    "skull and content": ("skull head brain intracranial", "skull|head|brain"),
    "spine and content": ("spine", "spine"),
    "lung mediastinum pleura": ("lung mediastinum pleura chest", "chest|lung mediastinum pleura"),
    "face sinus and neck": ("face sinus neck", "face sinus neck"),
    "vascular and lymphatic": ("vascular lymphatic", "vascular lymphatic"),
}
NEUTRAL = """
        a an the this that these those here there it its is are was be being been of in on at by with from for and as
        to which where within into image imaging imaged picture scan scanned study examination exam view viewed film
        series show shows shown showing display displays displayed displaying depict depicts depicted depicting
        demonstrate demonstrates demonstrated demonstrating present presents presented presenting reveal reveals
        revealed revealing see sees seen visible visualized visualised visualizing visualize visualizes view views
        include includes included capture captures captured capturing take taken obtain obtained acquire acquired
        acquiring use used using make made provide provides illustrate illustrates illustrated illustrating represent
        represents represented medical clinical diagnostic radiology radiological radiologic patient human body part
        region area anatomy anatomical structure structures system side orientation oriented technique method modality
        plane organ type sequence performed detail details detailed close consist consistent focus focused focusing
        subject subjects label labeled feature features featuring appear appears appearing identify identified can we
        through evidence via contain contains containing indicate indicates indicated indicating highlight highlights
        highlighting highlighted found example
        """
OF_FINDINGS = "abnormality abnormal finding diagnosis diagnosed diagnostic condition pathology case affected"
FINDING_KEYS = frozenset({"abnormality", "finding", "diagnosis", "disease", "pathology", "condition", "label", "class"})
